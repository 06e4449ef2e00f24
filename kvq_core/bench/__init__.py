"""The harness. It knows neither torch nor the engine, only the `Target` protocol."""
