"""What a policy costs in quality."""
