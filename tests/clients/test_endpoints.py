"""The endpoints beside completions: tokenize, detokenize, health, models, metrics."""

import pytest
from conftest import CONTEXT

VLLM_NAMES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:num_preemptions_total": "counter",
    "vllm:request_success_total": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
}
OBOL_NAMES = [
    "obol_gpu_seconds_total",
    "obol_kv_byte_seconds_total",
    "obol_cost_total",
    "obol_house_seconds_total",
    "obol_ledger_conservation_error_ns",
]


# Ids as llama.cpp gives them: no space is put before the text, digits stand alone.
@pytest.mark.real_model
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19556, 905]),
        ("12345 foo_bar\n\n  x", [33, 34, 35, 36, 37, 29856, 79, 6299, 8866, 1792]),
    ],
)
def test_tokenize_and_back(server, text, ids):
    answer = server.ok("/tokenize", {"model": "default", "prompt": text})
    assert answer["tokens"] == ids and answer["count"] == len(ids)
    assert server.ok("/detokenize", {"model": "default", "tokens": ids})["prompt"] == text


@pytest.mark.real_model
def test_the_tokenizer_says_what_it_is(server):
    info = server.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and info["bos_token"] == "<|im_start|>"
    assert "<|im_start|>" in info["chat_template"] and info["model_max_length"] == CONTEXT
    assert info["vocab_size"] == 49152


@pytest.mark.real_model
def test_every_golden_prompt_tokenizes_as_llama_cpp_does(server, golden):
    for case in golden:
        text = case.get("rendered", case.get("prompt"))
        assert server.ok("/tokenize", {"model": "default", "prompt": text})["tokens"] == case["ids"], text


@pytest.mark.real_model
def test_the_chat_template_renders_as_llama_cpp_does(server, golden):
    for case in golden:
        if "messages" in case:
            answer = server.ok("/tokenize", {"model": "default", "messages": case["messages"]})
            assert answer["tokens"] == case["ids"], case["rendered"]


def test_health_and_ready(server):
    assert server.get("/health").status == 200
    assert server.get("/ready").status == 200


def test_metrics_parse_and_have_vllms_names(server, name):
    server.ok("/v1/completions", {"model": name, "prompt": "A", "max_tokens": 3})
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    metrics = server.metrics()
    for metric, kind in VLLM_NAMES.items():
        assert metrics.types.get(metric) == kind, (metric, metrics.types.get(metric))
        suffix = "_bucket" if kind == "histogram" else ""
        assert metrics.values(metric + suffix), metric
    for metric in OBOL_NAMES:
        assert metrics.values(metric), metric
    assert metrics.total("obol_ledger_conservation_error_ns") == 0
    for metric in (name for name, kind in VLLM_NAMES.items() if kind == "histogram"):
        buckets = metrics.values(metric + "_bucket")
        assert all("le" in labels for labels, _ in buckets)
        infinite = sum(value for labels, value in buckets if labels["le"] == "+Inf")
        assert infinite == metrics.total(metric + "_count")
