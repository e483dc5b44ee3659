//! `obol bench` against servers that are scripted: what others answer, and how they break.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;

/// What a scripted server does with a request.
#[derive(Clone)]
enum Act {
    /// Answers with a status, a content type and a body.
    Say(u16, &'static str, String),
    /// Closes the connection after so many bytes of an answer.
    Break(String),
    /// Closes the connection and answers no more.
    Die,
}

#[derive(Default)]
struct Seen {
    heads: Vec<String>,
    bodies: Vec<Value>,
    connections: usize,
}

struct Scripted {
    url: String,
    seen: Arc<Mutex<Seen>>,
}

/// A server on a free port; `act` gets the number of a completion, from 0, and decides. Its thread ends with
/// the test's process.
fn scripted(close_after_each: bool, act: impl Fn(usize) -> Act + Send + Sync + 'static) -> Scripted {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (act, number, dead) =
        (Arc::new(act), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let for_thread = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(stream), seen) = (stream, for_thread.clone()) else { return };
            if dead.load(Ordering::SeqCst) {
                continue;
            }
            seen.lock().expect("no panic holds it").connections += 1;
            let (act, number, dead) = (act.clone(), number.clone(), dead.clone());
            std::thread::spawn(move || {
                let act = |path: &str| match path {
                    "/v1/models" => {
                        Act::Say(200, "application/json", r#"{"data": [{"id": "scripted"}]}"#.into())
                    }
                    _ => act(number.fetch_add(1, Ordering::SeqCst)),
                };
                serve(stream, close_after_each, &seen, &dead, act);
            });
        }
    });
    Scripted { url, seen }
}

fn serve(
    stream: TcpStream,
    close_after_each: bool,
    seen: &Mutex<Seen>,
    dead: &AtomicBool,
    act: impl Fn(&str) -> Act,
) {
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut writer = stream;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let length =
            head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body).expect("the body");
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        {
            let mut seen = seen.lock().expect("no panic holds it");
            seen.heads.push(head);
            seen.bodies.extend(serde_json::from_slice::<Value>(&body).ok());
        }
        let (text, open) = match act(&path) {
            Act::Say(status, kind, body) => (
                format!(
                    "HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                ),
                !close_after_each,
            ),
            Act::Break(body) => (
                format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99999\r\n\r\n{body}"
                ),
                false,
            ),
            Act::Die => {
                dead.store(true, Ordering::SeqCst);
                return;
            }
        };
        if writer.write_all(text.as_bytes()).is_err() || !open {
            return;
        }
    }
}

/// A stream of so many tokens, with or without a count of them.
fn stream(tokens: usize, usage: bool) -> Act {
    let chunk = "data: {\"choices\":[{\"text\":\" a\"}]}\n\n".repeat(tokens);
    let usage = if usage {
        format!(
            "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":10,\"completion_tokens\":{tokens}}}}}\n\n"
        )
    } else {
        String::new()
    };
    Act::Say(200, "text/event-stream", format!("{chunk}{usage}data: [DONE]\n\n"))
}

fn bench(arguments: &[&str]) -> (Option<i32>, Value, String) {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_obol"))
        .args(["bench", "--format", "json", "--input-words", "5", "--output-tokens", "4"])
        .args(arguments)
        .env_remove("OBOL_MODEL")
        .env("OBOL_BENCH_API_KEY", "sk-secret")
        .current_dir(std::env::temp_dir())
        .output()
        .expect("the program runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let printed = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code(), printed, said)
}

/// One round of two clients with two requests each, after one to warm up.
const QUICK: [&str; 8] = ["--concurrency", "2", "--requests", "2", "--rounds", "1", "--warmup", "1"];

#[test]
fn clients_keep_their_connections_and_ask_as_openai_does() {
    let server = scripted(false, |_| stream(4, true));
    let (code, json, said) = bench(&[&["--url", &server.url, "--name", "it"], &QUICK[..]].concat());
    assert_eq!(code, Some(0), "{said}");
    let figures = &json["points"][0]["figures"];
    assert_eq!((&figures["completed"], &figures["total_output_tokens"]), (&4.into(), &16.into()));
    assert_eq!(figures["total_input_tokens"], 40);
    assert!(figures["cost"].is_null() && json["warnings"].as_array().is_some_and(Vec::is_empty), "{json}");
    assert_eq!(json["subjects"][0]["model"]["name"], "scripted");
    let seen = server.seen.lock().expect("no panic holds it");
    assert_eq!((seen.connections, seen.bodies.len()), (2, 5));
    assert!(
        seen.heads.iter().all(|head| head.contains("authorization: Bearer sk-secret")),
        "{:?}",
        seen.heads
    );
    for body in &seen.bodies {
        assert_eq!(body["model"], "scripted");
        assert_eq!(body["stream_options"]["include_usage"], true);
        assert_eq!((&body["max_tokens"], &body["ignore_eos"]), (&4.into(), &true.into()));
        assert_eq!(body["prompt"].as_str().map(|prompt| prompt.split(' ').count()), Some(5));
    }
    assert!(!format!("{json}{said}").contains("sk-secret"), "no key is shown");
}

#[test]
fn a_server_that_closes_connections_and_counts_nothing_is_measured() {
    let server = scripted(true, |_| stream(3, false));
    let (code, json, said) = bench(&[&["--url", &server.url], &QUICK[..]].concat());
    assert_eq!(code, Some(0), "{said}");
    let figures = &json["points"][0]["figures"];
    assert_eq!((&figures["completed"], &figures["total_output_tokens"]), (&4.into(), &12.into()));
    assert!(figures["total_input_tokens"].is_null());
    assert!(json["warnings"][0].as_str().is_some_and(|warning| warning.contains("tells no usage")), "{json}");
}

#[test]
fn conversations_repeat_what_was_said() {
    let server = scripted(false, |_| stream(2, true));
    let turns = ["--url", &server.url, "--endpoint", "chat", "--turns", "2", "--no-ignore-eos"];
    let once = ["--concurrency", "1", "--requests", "1", "--rounds", "1", "--warmup", "0"];
    let (code, _, said) = bench(&[&turns[..], &once].concat());
    assert_eq!(code, Some(0), "{said}");
    let seen = server.seen.lock().expect("no panic holds it");
    let [first, second] = &seen.bodies[..] else { panic!("two turns: {:?}", seen.bodies) };
    assert!(first.get("ignore_eos").is_none());
    assert_eq!(first["messages"][0], second["messages"][0]);
    assert_eq!(second["messages"][1], serde_json::json!({ "role": "assistant", "content": " a a" }));
    assert_eq!(second["messages"][2]["role"], "user");
    assert_ne!(second["messages"][2]["content"], second["messages"][0]["content"]);
}

#[test]
fn a_peer_that_dies_fails_its_points_and_no_others() {
    let ours = scripted(false, |_| stream(4, true));
    // After the warm-up and the first point's four requests.
    let peer = scripted(false, |number| if number < 5 { stream(4, true) } else { Act::Die });
    let both = ["--url", &ours.url, "--name", "ours", "--against", &peer.url, "--against-name", "theirs"];
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("all.json");
    let path = file.to_str().expect("UTF-8");
    let load = ["--concurrency", "2,4", "--requests", "2", "--rounds", "1", "--warmup", "1", "--json", path];
    let (code, json, said) = bench(&[&both[..], &load].concat());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("8 requests failed"), "{said}");
    let written: Value =
        serde_json::from_str(&std::fs::read_to_string(&file).expect("written")).expect("JSON");
    assert_eq!(written, json);
    let counts = |index: usize| {
        let figures = &json["points"][index]["figures"];
        [&figures["completed"], &figures["failed"]].map(|count| count.as_u64().expect("a count"))
    };
    assert_eq!([0, 1, 2, 3].map(counts), [[4, 0], [4, 0], [8, 0], [0, 8]]);
    let failures = json["points"][3]["failures"].as_array().expect("a list");
    assert!(
        failures
            .iter()
            .all(|failure| failure["message"].as_str().is_some_and(|said| said.contains("connection")))
    );
    assert!(json["points"][0]["ratio_to_peer"]["output_throughput"].as_f64() > Some(0.0), "{json}");
    assert!(json["points"][2]["ratio_to_peer"].as_object().is_some_and(serde_json::Map::is_empty));
}

#[test]
fn answers_that_break_are_failures_with_their_reasons() {
    let server = scripted(false, |number| match number % 4 {
        0 => stream(4, true),
        1 => Act::Break("data: {\"choices\":[{\"text\":\"a\"}]}\n\n".into()),
        2 => Act::Say(503, "application/json", "{\"error\":{\"message\":\"overloaded\"}}".into()),
        _ => Act::Say(200, "application/json", "{\"choices\":[]}".into()),
    });
    let load = ["--concurrency", "1", "--requests", "4", "--rounds", "1", "--warmup", "0"];
    let (code, json, said) = bench(&[&["--url", &server.url], &load[..]].concat());
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(
        (&json["points"][0]["figures"]["completed"], &json["points"][0]["figures"]["failed"]),
        (&1.into(), &3.into())
    );
    let told = json["points"][0]["failures"].to_string();
    for part in
        ["the connection broke in an answer", "503 Service Unavailable", "overloaded", "no event stream"]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn a_server_that_cannot_be_measured_is_told_before_anything_is() {
    let nobody =
        TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let (code, json, said) = bench(&["--url", &format!("http://{nobody}")]);
    assert_eq!((code, json), (Some(1), Value::Null), "{said}");
    assert!(said.contains("no server answers at") && said.contains("GET /v1/models failed"), "{said}");
    assert!(said.contains("refused"), "{said}");

    let refusing =
        scripted(false, |_| Act::Say(404, "application/json", "{\"error\":\"no such model\"}".into()));
    let (code, json, said) = bench(&[&["--url", &refusing.url, "--model-name", "x"], &QUICK[..]].concat());
    assert_eq!((code, json), (Some(1), Value::Null), "{said}");
    assert!(
        said.contains("a warm-up request failed: 404 Not Found: {\"error\":\"no such model\"}"),
        "{said}"
    );
}
