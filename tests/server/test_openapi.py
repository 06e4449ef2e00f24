"""Whatever the description of the interface allows, and much that it doesn't, gets an answer, not a fault."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from kvq_core.server.openapi import description

OPERATIONS = [result.ok() for result in schemathesis.openapi.from_dict(description()).get_all_operations()]
QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def test_the_description_is_served_and_complete(serve: Any) -> None:
    running = serve(api_key="secret")
    served = httpx.get(f"{running.url}/openapi.json").json()
    assert served == description()
    routes = {(r.path.replace(":path", ""), *r.methods) for r in running.server.config.app.routes}
    assert routes - {("/openapi.json", "GET")} == {(op.path, op.method.upper()) for op in OPERATIONS}
    fields = served["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "logprobs", "top_logprobs", "stream", "tools", "user", "top_k"} <= fields.keys()


CASES = [(op, GenerationMode.POSITIVE) for op in OPERATIONS]
CASES += [(op, GenerationMode.NEGATIVE) for op in OPERATIONS if op.body]


@pytest.mark.parametrize(("operation", "mode"), CASES, ids=lambda x: getattr(x, "label", None) or x.value)
def test_no_request_is_a_fault_of_the_server(serve: Any, operation: Any, mode: GenerationMode) -> None:
    running = serve(max_model_len=40, max_queue=300)

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=80 if operation.body else 15, **QUIET)
    def play(case: schemathesis.Case) -> None:
        if case.body is not None and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # else hardly any request gets past it
        response = case.call(base_url=running.url, timeout=20)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code != 200:
            assert response.json()["error"]["message"]

    play()
    assert running.is_clean()
