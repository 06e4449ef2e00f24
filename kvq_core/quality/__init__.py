"""What a policy does to a model's predictions."""
