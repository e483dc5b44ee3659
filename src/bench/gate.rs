//! An earlier result as a limit: which figures are worse than it allows. Works on the JSON of both, so that
//! what can be written can be held against. Peers are not held to anything.

use serde_json::Value;

use super::figures as name;

/// The figures that count; less is worse for the first, more for the others.
const HIGHER_IS_BETTER: [&str; 1] = [name::OUTPUT_THROUGHPUT];
const LOWER_IS_BETTER: [&str; 3] = [name::MEDIAN_TTFT, name::MEDIAN_ITL, name::COST_TOKENS];

/// An earlier result, and how much worse than it is allowed.
#[derive(Debug, Clone)]
pub struct Gate {
    earlier: Value,
    /// As a part of 1.
    tolerance: f64,
    any_machine: bool,
}

/// What became of the earlier result's points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// A line for each figure that is worse than allowed.
    pub worse: Vec<String>,
    /// Points that were not measured now.
    pub unmeasured: Vec<String>,
    pub compared: usize,
}

impl Gate {
    /// # Errors
    /// When `text` is no result of this command.
    pub fn new(text: &str, tolerance: f64, any_machine: bool) -> Result<Self, String> {
        let earlier: Value = serde_json::from_str(text).map_err(|error| format!("it is no JSON: {error}"))?;
        if earlier["kind"] != super::render::KIND || !earlier["points"].is_array() {
            return Err("it is no result of `obol bench`; write one with --json".into());
        }
        Ok(Self { earlier, tolerance, any_machine })
    }

    /// Whether a result can be held against the earlier one, as far as its plan tells.
    ///
    /// # Errors
    /// Says what is different.
    pub fn comparable(&self, plan: &Value) -> Result<(), String> {
        let machine = "another machine; measure here first, or say --gate-any-machine";
        if !self.any_machine {
            self.same(plan, "machine", machine)?;
        }
        self.same(plan, "workload", "another workload; repeat the command that it has")?;
        self.same(plan, "rate", "another price; the costs cannot be compared")
    }

    fn same(&self, now: &Value, part: &str, otherwise: &str) -> Result<(), String> {
        let (earlier, now) = (&self.earlier[part], &now[part]);
        let names = [earlier, now].map(|value| value.as_object().into_iter().flat_map(|o| o.keys()));
        match names.into_iter().flatten().find(|name| earlier[name.as_str()] != now[name.as_str()]) {
            None => Ok(()),
            Some(name) => Err(format!(
                "the earlier result is of {otherwise}: {part} {name} is {}, and now {}",
                earlier[name], now[name]
            )),
        }
    }

    /// Holds a result against the earlier one.
    ///
    /// # Errors
    /// When they cannot be compared: another machine, workload, price or model, or no point in common.
    pub fn judge(&self, now: &Value) -> Result<Verdict, String> {
        self.comparable(now)?;
        let mut verdict = Verdict { worse: Vec::new(), unmeasured: Vec::new(), compared: 0 };
        for point in own_points(&self.earlier) {
            let subject = subject_of(&self.earlier, point);
            let same_point = |other: &&Value| {
                other["load"] == point["load"] && subject_of(now, other)["setup"] == subject["setup"]
            };
            let label = label(point);
            let Some(other) = own_points(now).find(same_point) else {
                verdict.unmeasured.push(label);
                continue;
            };
            let model = &subject_of(now, other)["model"];
            if *model != subject["model"] {
                return Err(format!(
                    "the earlier result is of another model: {label} was {}, and is now {model}",
                    subject["model"]
                ));
            }
            verdict.compared += 1;
            verdict.worse.extend(self.worse(&label, point, other));
        }
        if verdict.compared == 0 {
            return Err(format!(
                "no point of the earlier result was measured now; it has {}",
                verdict.unmeasured.join("; ")
            ));
        }
        Ok(verdict)
    }

    fn worse(&self, label: &str, earlier: &Value, now: &Value) -> Vec<String> {
        let figure = |point: &Value, name: &str| point["figures"][name].as_f64();
        let mut lines = Vec::new();
        let failed = [earlier, now].map(|point| figure(point, name::FAILED).unwrap_or(0.0));
        if failed[1] > failed[0] {
            lines.push(format!("{label}: {} requests failed, {} before", failed[1], failed[0]));
        }
        for name in HIGHER_IS_BETTER.iter().chain(&LOWER_IS_BETTER) {
            let Some(before) = figure(earlier, name) else { continue };
            let Some(after) = figure(now, name) else {
                lines.push(format!("{label}: {name} was {}, and is not known now", short(before)));
                continue;
            };
            let more_is_worse = LOWER_IS_BETTER.contains(name);
            let limit =
                if more_is_worse { before * (1.0 + self.tolerance) } else { before * (1.0 - self.tolerance) };
            if if more_is_worse { after > limit } else { after < limit } {
                lines.push(format!(
                    "{label}: {name} is {}, {} before: {:+.1} %, {} {} allowed",
                    short(after),
                    short(before),
                    (after / before - 1.0) * 100.0,
                    if more_is_worse { "at most" } else { "at least" },
                    short(limit)
                ));
            }
        }
        lines
    }
}

fn own_points(result: &Value) -> impl Iterator<Item = &Value> {
    let points = result["points"].as_array().into_iter().flatten();
    points.filter(|point| subject_of(result, point)["peer"] != true)
}

fn subject_of<'a>(result: &'a Value, point: &Value) -> &'a Value {
    let mut subjects = result["subjects"].as_array().into_iter().flatten();
    subjects.find(|subject| subject["name"] == point["subject"]).unwrap_or(&Value::Null)
}

fn label(point: &Value) -> String {
    let said = |part: &Value| part.as_str().unwrap_or_default().to_owned();
    format!("{}, {}", said(&point["load"]["name"]), said(&point["subject"]))
}

/// Four digits that count.
fn short(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let decimals = (3.0 - value.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn result() -> Value {
        let point = |subject: &str, load: &str| {
            json!({
                "subject": subject,
                "load": { "name": load },
                "figures": {
                    "output_throughput": 100.0, "median_ttft_ms": 50.0, "median_itl_ms": 10.0,
                    "cost_per_million_tokens": 0.25, "failed": 0, "p99_ttft_ms": 60.0,
                },
            })
        };
        json!({
            "kind": "obol bench",
            "machine": { "device": "a", "threads": 2 },
            "workload": { "turns": 1 },
            "rate": { "device_hour": "0.1" },
            "subjects": [
                { "name": "own", "setup": { "quant": "file" }, "model": { "fingerprint": "f" } },
                { "name": "peer", "setup": { "url": "x" }, "model": {}, "peer": true },
            ],
            "points": [point("own", "1 client"), point("peer", "1 client"), point("own", "8 clients")],
        })
    }

    fn judge(change: impl Fn(&mut Value)) -> Result<Verdict, String> {
        judge_on(false, change)
    }

    fn judge_on(any_machine: bool, change: impl Fn(&mut Value)) -> Result<Verdict, String> {
        let gate = Gate::new(&result().to_string(), 0.1, any_machine).unwrap();
        let mut now = result();
        change(&mut now);
        gate.judge(&now)
    }

    #[test]
    fn what_is_within_the_tolerance_passes() {
        let verdict = judge(|now| {
            let figures = &mut now["points"][0]["figures"];
            figures["output_throughput"] = json!(90.1);
            figures["median_ttft_ms"] = json!(54.9);
            figures["median_itl_ms"] = json!(1.0);
            figures["p99_ttft_ms"] = json!(6000);
            // A peer may be as slow as it likes.
            now["points"][1]["figures"]["output_throughput"] = json!(1.0);
        });
        assert_eq!(verdict.unwrap(), Verdict { worse: vec![], unmeasured: vec![], compared: 2 });
    }

    #[test]
    fn every_kind_of_regression_is_told() {
        for (name, value, says) in [
            ("output_throughput", 89.9, "is 89.90, 100.0 before: -10.1 %, at least 90.00 allowed"),
            ("median_ttft_ms", 55.1, "is 55.10, 50.00 before: +10.2 %, at most 55.00 allowed"),
            ("median_itl_ms", 12.0, "is 12.00, 10.00 before: +20.0 %, at most 11.00 allowed"),
            ("cost_per_million_tokens", 0.28, "is 0.2800, 0.2500 before: +12.0 %, at most 0.2750 allowed"),
        ] {
            let verdict = judge(|now| now["points"][2]["figures"][name] = json!(value)).unwrap();
            assert_eq!(verdict.worse, [format!("8 clients, own: {name} {says}")]);
            let gone = judge(|now| now["points"][2]["figures"][name] = Value::Null).unwrap();
            assert!(gone.worse[0].ends_with("and is not known now"), "{:?}", gone.worse);
        }
        let failed = judge(|now| now["points"][0]["figures"]["failed"] = json!(3)).unwrap();
        assert_eq!(failed.worse, ["1 client, own: 3 requests failed, 0 before"]);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let says = |change: &dyn Fn(&mut Value), part: &str| {
            let said = judge(change).unwrap_err();
            assert!(said.contains(part), "{said}");
        };
        says(&|now| now["machine"]["device"] = json!("b"), "machine device is \"a\", and now \"b\"");
        says(&|now| now["workload"]["turns"] = json!(2), "workload turns is 1, and now 2");
        says(&|now| now["workload"]["more"] = json!(2), "workload more is null, and now 2");
        says(&|now| now["rate"]["device_hour"] = json!("2"), "another price");
        says(&|now| now["subjects"][0]["model"]["fingerprint"] = json!("g"), "another model");
        says(
            &|now| now["subjects"][0]["setup"]["quant"] = json!("int4"),
            "it has 1 client, own; 8 clients, own",
        );
        let elsewhere = judge_on(true, |now| now["machine"]["device"] = json!("b"));
        assert_eq!(elsewhere.unwrap().compared, 2);
        for text in ["", "{}", "[1]", r#"{"kind": "obol bench"}"#] {
            assert!(Gate::new(text, 0.1, false).is_err(), "{text}");
        }
    }

    #[test]
    fn points_that_were_not_measured_are_told() {
        let verdict = judge(|now| {
            now["points"].as_array_mut().unwrap().pop();
        });
        assert_eq!(
            verdict.unwrap(),
            Verdict { worse: vec![], unmeasured: vec!["8 clients, own".into()], compared: 1 }
        );
    }
}
