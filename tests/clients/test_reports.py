"""Reports of a server that runs: the same figures from the command line and over HTTP."""

import csv
import io
import json
import time
from decimal import Decimal

import harness


def test_spend_is_the_same_from_the_command_line_and_over_http(start, name):
    own = start("--max-model-len", "512")
    right = {}
    for number in range(4):
        team = f"team-{number}"
        body = own.ok(
            "/v1/completions",
            {"model": name, "prompt": f"Number {number} is", "max_tokens": 2 + number},
            headers={"x-obol-team": team},
        )
        right[team] = Decimal(body["usage"]["obol"]["cost"]["total"])

    logs = own.get("/spend/logs").json()
    assert {row["team_id"]: Decimal(row["obol"]["cost"]["total"]) for row in logs} == right

    days = own.get("/global/spend/report?group_by=team").json()
    teams = [team for day in days for team in day["teams"]]
    assert {team["team_name"]: Decimal(team["obol"]["total_spend"]) for team in teams} == right

    since = int(time.time()) - 86_400
    page = own.get(f"/v1/organization/costs?start_time={since}&group_by[]=team").json()
    results = [result for bucket in page["data"] for result in bucket["results"]]
    assert {result["team"]: Decimal(result["obol"]["value"]) for result in results} == right

    def printed(*arguments):
        result = harness.run("report", *arguments, "--data-dir", str(own.data_dir))
        assert result.returncode == 0, result.stderr
        return result.stdout

    rows = json.loads(printed("--by", "team", "--json"))["rows"]
    assert {row["team"]: Decimal(row["usage_cost"]) for row in rows} == right
    rows = list(csv.DictReader(io.StringIO(printed("--by", "team", "--format", "csv"))))
    assert {row["team"]: Decimal(row["usage_cost"]) for row in rows if row["kind"] == "usage"} == right
    focus = {}
    for row in csv.DictReader(io.StringIO(printed("--format", "focus"))):
        if row["Tags"]:
            team = json.loads(row["Tags"])["team"]
            focus[team] = focus.get(team, 0) + Decimal(row["BilledCost"])
    assert focus == right
    own.audit()
