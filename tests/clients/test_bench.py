"""`obol bench` against our own server over real HTTP, with a peer, and in process: counts, costs and files."""

import json
import math
import subprocess
import xml.etree.ElementTree

import harness

SVG = "{http://www.w3.org/2000/svg}"


def bench(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """A run's result, and what it printed as JSON."""
    result = harness.run("bench", "--format", "json", *arguments, timeout=600, **environment)
    return result, json.loads(result.stdout) if result.stdout else {}


def point(figures: dict, subject: str, load: str) -> dict:
    """A subject's point under a load."""
    (found,) = [p for p in figures["points"] if (p["subject"], p["load"]["name"]) == (subject, load)]
    return found


def test_two_servers_take_turns(start, tmp_path, say):
    first, second = start(), start("--prefix-caching", "false")
    written, drawn = tmp_path / "all.json", tmp_path / "all.svg"
    result, figures = bench(
        *("--url", first.url, "--name", "cached", "--against", second.url + "/v1", "--against-name", "plain"),
        *("--concurrency", "1,3", "--requests", "2", "--rounds", "2", "--output-tokens", "6"),
        *("--input-words", "20", "--shared-prefix-words", "100"),
        *("--json", str(written), "--svg", str(drawn)),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(written.read_text()) == figures
    assert not figures["warnings"]
    for clients, load in ((1, "1 client"), (3, "3 clients")):
        cached, plain = point(figures, "cached", load), point(figures, "plain", load)
        for each in (cached, plain):
            counts = each["figures"]
            assert counts["completed"] == 2 * 2 * clients and counts["failed"] == 0
            assert counts["total_output_tokens"] == 6 * counts["completed"]
            assert each["load"]["concurrency"] == clients
            # What the rate card charges for so much device time and hardly any memory: 80 % of 0.10 an hour.
            assert math.isclose(counts["cost"], counts["device_seconds"] * 0.08 / 3600, rel_tol=0.01)
            assert 0 < counts["load_cpu_of_machine"] <= counts["load_cpu_of_one_core"] < 2
        # The same prompts; only one of the two finds what they share, all of it but in each round's first.
        assert cached["figures"]["total_input_tokens"] == plain["figures"]["total_input_tokens"]
        assert plain["figures"]["prefix_cache_hit_tokens"] == 0
        assert cached["figures"]["prefix_cache_hit_tokens"] >= 2 * 80
        assert set(cached["ratio_to_peer"]) == {
            *("output_throughput", "median_ttft_ms", "median_itl_ms", "median_e2el_ms")
        }
        assert not plain["ratio_to_peer"]
        say(f"{load}: {cached['ratio_to_peer']['output_throughput']:.2f} times the throughput with a cache")
    root = xml.etree.ElementTree.parse(drawn).getroot()
    assert root.tag == f"{SVG}svg"
    assert any("3 cached" in (text.text or "") for text in root.iter(f"{SVG}text"))
    # What the servers' books say is what was counted: warm-up and all.
    counted = sum(p["figures"]["cost"] for p in figures["points"] if p["subject"] == "cached")
    report = json.loads(harness.run("report", "--json", "--data-dir", str(first.data_dir)).stdout)
    booked = sum(float(row["usage_cost"]) for row in report["rows"])
    assert counted < booked < counted * 2
    assert sum(row["requests"] for row in report["rows"]) == 2 + 2 * 2 * (1 + 3)


def test_an_open_loop_of_conversations(server):
    result, figures = bench(
        *("--url", server.url, "--name", "it", "--endpoint", "chat", "--turns", "2", "--input-words", "10"),
        *("--request-rate", "20", "--num-prompts", "4", "--max-concurrency", "2", "--rounds", "1"),
        *("--output-tokens", "5", "--seed", "77"),
    )
    assert result.returncode == 0, result.stderr
    counts = point(figures, "it", "20 req/s")["figures"]
    assert counts["completed"] == 8 and counts["total_output_tokens"] == 40
    assert counts["max_concurrent_requests"] <= 2
    # Waiting for one of two places is latency of the request, not of the load generator.
    assert counts["mean_ttft_ms"] > counts["mean_send_delay_ms"] >= 0


def test_the_server_refuses_and_dies(start):
    own = start("--max-model-len", "64")
    result, _ = bench("--url", own.url, "--input-words", "100", "--rounds", "1")
    assert result.returncode == 1
    assert "warm-up request failed: 400 Bad Request" in result.stderr
    assert "context_length_exceeded" in result.stderr
    result, _ = bench("--url", own.url, "--model-name", "none", "--rounds", "1", "--input-words", "5")
    assert "404 Not Found" in result.stderr and "model_not_found" in result.stderr
    own.kill()
    result, _ = bench("--url", own.url)
    assert result.returncode == 1
    assert f"no server answers at {own.url}" in result.stderr


def test_in_process_beside_a_server(server):
    result, figures = bench(
        *(harness.model(), "--against", server.url, "--against-name", "served", "--concurrency", "2"),
        *("--requests", "1", "--rounds", "1", "--input-tokens", "50", "--output-tokens", "4", "--seed", "78"),
    )
    assert result.returncode == 0, result.stderr
    own, served = point(figures, "obol", "2 clients"), point(figures, "served", "2 clients")
    assert own["figures"]["total_input_tokens"] == 2 * 50
    assert served["figures"]["total_input_tokens"] >= 2 * 45
    assert figures["subjects"][0]["model"]["precision"] == "Q4_1"
    assert own["ratio_to_peer"]["output_throughput"] > 0


def test_an_interrupt_leaves_no_result(tmp_path):
    written = tmp_path / "all.json"
    written.write_text("an earlier result")
    command = ["bench", harness.model(), "--rounds", "1000", "--json", str(written)]
    data = ["--data-dir", str(tmp_path / "data")]
    assert not harness.interrupted(*command, *data, at="round 1", cwd=tmp_path)
    assert written.read_text() == "an earlier result"
    assert {path.name for path in tmp_path.iterdir()} <= {"all.json", "data"}
