"""An OpenAI-compatible server; needs the extra `serve` (FastAPI, uvicorn, prometheus-client)."""
