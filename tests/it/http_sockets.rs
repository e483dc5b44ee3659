//! Clients that behave badly, over real sockets: the server settles each of them and lives on.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use obol::units::RequestId;
use serde_json::{Value, json};

use crate::http_world::{Options, World, wait_until, world, world_with};

fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).expect("a connection");
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    socket
}

fn post(address: SocketAddr, headers: &str, body: &Value) -> TcpStream {
    let mut socket = connect(address);
    let body = body.to_string();
    write!(
        socket,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: obol\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("the request is sent");
    socket
}

/// Reads until `end` has come or the server has closed.
fn read_until(socket: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&bytes).contains(end) {
        match socket.read(&mut buffer).expect("an answer within 10 s") {
            0 => break,
            count => bytes.extend_from_slice(&buffer[..count]),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn long(stream: bool) -> Value {
    json!({"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "stream": stream})
}

fn request_id(response: &str) -> RequestId {
    let line = response.lines().find_map(|line| line.strip_prefix("x-request-id: "));
    RequestId(line.expect("an id").to_owned())
}

fn status_of(world: &World, id: &RequestId) -> String {
    wait_until("the receipt", || world.ledger.receipt(id).expect("a ledger").is_some());
    let receipt = world.ledger.receipt(id).expect("a ledger").expect("a receipt");
    receipt.to_json()["status"].as_str().expect("a status").to_owned()
}

fn slow_world() -> World {
    world_with(Options { step: Duration::from_millis(5), ..Options::default() })
}

#[test]
fn a_client_that_leaves_mid_stream_is_cancelled_and_settled() {
    let world = slow_world();
    let address = world.listen();
    let mut left = Vec::new();
    for _ in 0..8 {
        let mut socket = post(address, "", &long(true));
        left.push(request_id(&read_until(&mut socket, "data: ")));
        // Dropped here: the client is gone.
    }
    world.wait_until_idle();
    for id in &left {
        assert_eq!(status_of(&world, id), "cancelled");
    }
}

#[test]
fn a_client_that_leaves_before_a_whole_answer_is_cancelled() {
    let world = slow_world();
    let address = world.listen();
    let socket = post(address, "", &long(false));
    wait_until("the request to run", || world.engine.stats().running > 0);
    drop(socket);
    let steps = world.engine.stats().steps;
    world.wait_until_idle();
    assert!(world.engine.stats().steps < steps + 100, "it was not run to its end");
}

#[test]
fn half_a_body_takes_no_seat_and_harms_nobody() {
    let world = world();
    let address = world.listen();
    let mut socket = connect(address);
    write!(
        socket,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: obol\r\ncontent-length: 500\r\n\r\n{{\"model\":"
    )
    .expect("half a request");
    assert_eq!(world.engine.stats().waiting, 0);
    drop(socket);
    let mut next = post(address, "connection: close\r\n", &long(true));
    assert!(read_until(&mut next, "[DONE]").contains("[DONE]"));
}

#[test]
fn a_body_that_stalls_is_408() {
    let mut options = Options::default();
    options.http.body_time_max = Duration::from_millis(100);
    let world = world_with(options);
    let mut socket = connect(world.listen());
    write!(socket, "POST /v1/completions HTTP/1.1\r\nhost: obol\r\ncontent-length: 500\r\n\r\n{{")
        .expect("a part");
    let answer = read_until(&mut socket, "\"type\"");
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("did not arrive"), "{answer}");
}

#[test]
fn a_slow_reader_does_not_hold_blocks_and_gets_everything() {
    let world = world();
    let address = world.listen();
    let mut socket = post(address, "te: trailers\r\nconnection: close, te\r\n", &long(true));
    world.wait_until_idle();
    std::thread::sleep(Duration::from_millis(50));
    let answer = read_until(&mut socket, "\r\n0\r\n");
    let mut rest = String::new();
    socket.read_to_string(&mut rest).expect("the end");
    let answer = answer + &rest;
    assert!(answer.contains("data: [DONE]\n\n"), "{answer}");
    let after = answer.split("data: [DONE]").nth(1).expect("trailers");
    assert!(after.contains("x-obol-cost: 0.") && after.contains("x-obol-gpu-seconds: "), "{after}");
    assert_eq!(status_of(&world, &request_id(&answer)), "length");
}

#[test]
fn a_long_wait_is_kept_alive_with_comments() {
    let mut options = Options { step: Duration::from_millis(300), ..Options::default() };
    options.http.keep_alive = Duration::from_millis(50);
    let world = world_with(options);
    let mut socket = post(world.listen(), "", &long(true));
    let answer = read_until(&mut socket, "data: ");
    assert!(answer.contains(": keep-alive\n\n"), "{answer}");
    drop(socket);
    world.wait_until_idle();
}

#[test]
fn what_is_not_http_is_turned_away() {
    let world = world();
    let address = world.listen();
    for garbage in [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], b"GET\r\n\r\n", b"\r\n\r\n\r\n\0\0"]
    {
        let mut socket = connect(address);
        socket.write_all(garbage).expect("sent");
        socket.shutdown(Shutdown::Write).expect("half closed");
        let mut answer = Vec::new();
        // A reset is as good as an error page here.
        drop(socket.read_to_end(&mut answer));
    }
    let mut next = post(address, "connection: close\r\n", &long(true));
    assert!(read_until(&mut next, "[DONE]").contains("[DONE]"));
}

#[test]
fn a_body_over_the_limit_is_told_so_before_it_is_all_there() {
    let world = world();
    let address = world.listen();
    let big = "x".repeat(20 << 20);
    for framing in [
        format!("content-length: {}\r\n\r\n{big}", big.len()),
        format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n{big}\r\n0\r\n\r\n", big.len()),
        // Announced, never sent.
        format!("content-length: {}\r\n\r\n", big.len()),
    ] {
        let mut socket = connect(address);
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: obol\r\n";
        socket.write_all(format!("{head}{framing}").as_bytes()).expect("it is read, or thrown away");
        let answer = read_until(&mut socket, "request_too_large");
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    }
}
