//! Embeddings, rerank and score over HTTP: shapes, bounds, and one receipt a request.

use axum::http::StatusCode;
use obol::ledger::audit;
use serde_json::{Value, json};

use crate::http_world::{Answer, CONTEXT, Options, World, world, world_with};

async fn ask(world: &World, path: &str, body: Value) -> Answer {
    let answer = world.post(path, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer
}

async fn embed(world: &World, input: Value, extra: Value) -> Vec<Vec<f64>> {
    let mut body = json!({"model": "fake", "input": input});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    let answer = ask(world, "/v1/embeddings", body).await.json();
    let data = answer["data"].as_array().expect("a list");
    let numbers =
        |value: &Value| value.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("one")).collect();
    data.iter().map(|item| numbers(&item["embedding"])).collect()
}

fn length(vector: &[f64]) -> f64 {
    vector.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Header, body and ledger say the same.
async fn check_receipt(world: &World, answer: &Answer, endpoint_tokens: u64) {
    let usage = &answer.json()["usage"];
    let receipt = &usage["obol"];
    let id = answer.header("x-request-id");
    assert_eq!(receipt["request_id"], id);
    assert_eq!(answer.header("x-obol-cost"), receipt["cost"]["total"]);
    assert_eq!(answer.header("x-obol-gpu-seconds"), receipt["gpu_seconds"]);
    assert_eq!(usage["cost"].as_f64(), receipt["cost"]["total"].as_str().and_then(|cost| cost.parse().ok()));
    assert!(usage["cost"].as_f64() > Some(0.0));
    assert_eq!(
        (&usage["prompt_tokens"], &usage["total_tokens"]),
        (&json!(endpoint_tokens), &json!(endpoint_tokens))
    );
    assert_eq!((&receipt["tokens"]["completion"], &receipt["status"]), (&json!(0), &json!("stop")));
    assert_eq!(&world.get(&format!("/v1/requests/{id}")).await.json(), receipt);
}

#[tokio::test]
async fn each_input_has_a_vector_of_length_1_and_the_request_one_receipt() {
    let world = world();
    let body = json!({"model": "default", "input": ["hello", "there", "hello"], "user": "ada"});
    let answer = ask(&world, "/v1/embeddings", body).await;
    check_receipt(&world, &answer, 15).await;
    let body = answer.json();
    assert_eq!((&body["object"], &body["model"]), (&json!("list"), &json!("fake/model")));
    assert_eq!(body["usage"]["obol"]["user"], "ada");
    let data = body["data"].as_array().expect("a list");
    for (index, item) in data.iter().enumerate() {
        assert_eq!((&item["object"], &item["index"]), (&json!("embedding"), &json!(index)));
    }
    let all = embed(&world, json!(["hello", "there", "hello"]), json!({})).await;
    assert_eq!((all.len(), all[0].len()), (3, 4));
    assert!(all.iter().all(|vector| (length(vector) - 1.0).abs() < 1e-6));
    assert!(all[0] == all[2] && all[0] != all[1]);
    // However it is said.
    let tokens: Vec<u8> = b"hello".to_vec();
    for input in [json!("hello"), json!(["hello"]), json!(tokens), json!([tokens])] {
        assert_eq!(embed(&world, input, json!({})).await, all[..1]);
    }
    assert!(audit(world.data_dir.path()).expect("a readable ledger").is_reconciled());
}

#[tokio::test]
async fn fewer_dimensions_are_the_first_ones_at_length_1() {
    let world = world();
    let whole = embed(&world, json!("hello"), json!({})).await.remove(0);
    let cut = embed(&world, json!("hello"), json!({"dimensions": 2})).await.remove(0);
    assert_eq!(cut.len(), 2);
    assert!((length(&cut) - 1.0).abs() < 1e-6);
    assert!((cut[0] * whole[1] - cut[1] * whole[0]).abs() < 1e-6, "the same direction");
    assert_eq!(embed(&world, json!("hello"), json!({"dimensions": 4})).await, [whole]);
}

#[tokio::test]
async fn base64_has_the_same_bits() {
    let world = world();
    let whole = embed(&world, json!("hello"), json!({"encoding_format": "float"})).await.remove(0);
    let body = json!({"model": "fake", "input": "hello", "encoding_format": "base64"});
    let answer = ask(&world, "/v1/embeddings", body).await.json();
    let text = answer["data"][0]["embedding"].as_str().expect("text");
    let digit = |c: char| match c {
        'A'..='Z' => c as u32 - 'A' as u32,
        'a'..='z' => c as u32 - 'a' as u32 + 26,
        '0'..='9' => c as u32 - '0' as u32 + 52,
        '+' => 62,
        '/' => 63,
        _ => panic!("{c} is no digit"),
    };
    let bits: Vec<u32> = text.trim_end_matches('=').chars().map(digit).collect();
    let bytes: Vec<u8> = bits
        .iter()
        .flat_map(|digit| (0..6).rev().map(move |bit| digit >> bit & 1))
        .collect::<Vec<_>>()
        .chunks_exact(8)
        .map(|byte| byte.iter().fold(0, |byte, bit| byte << 1 | *bit as u8))
        .collect();
    let values: Vec<f64> = bytes
        .chunks_exact(4)
        .map(|four| f64::from(f32::from_le_bytes(four.try_into().expect("four"))))
        .collect();
    assert_eq!(values, whole);
}

#[tokio::test]
async fn documents_come_back_nearest_first() {
    let world = world();
    let documents = ["there", "hello", "you"];
    let texts = [["hello"].as_slice(), &documents].concat();
    let vectors = embed(&world, json!(texts), json!({})).await;
    let cosine = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut expected: Vec<(usize, f64)> =
        vectors[1..].iter().map(|vector| cosine(&vectors[0], vector)).enumerate().collect();
    expected.sort_by(|a, b| b.1.total_cmp(&a.1));
    assert_eq!(expected[0].0, 1, "the same text");

    let body = json!({"model": "fake", "query": "hello", "documents": documents});
    let answer = ask(&world, "/v1/rerank", body).await;
    check_receipt(&world, &answer, 5 + 5 + 5 + 3).await;
    let results = answer.json()["results"].clone();
    for (at, (index, score)) in expected.iter().enumerate() {
        assert_eq!(results[at]["index"], *index);
        assert!((results[at]["relevance_score"].as_f64().expect("a number") - score).abs() < 1e-9);
        assert_eq!(results[at]["document"]["text"], documents[*index]);
    }
    let body = json!({
        "model": "fake", "query": "hello", "documents": [{"text": "there"}, "hello", {"text": "you"}],
        "top_n": 1, "return_documents": false,
    });
    let answer = ask(&world, "/v1/rerank", body).await.json();
    assert_eq!(answer["results"].as_array().map(Vec::len), Some(1));
    assert_eq!(answer["results"][0]["index"], 1);
    assert!(answer["results"][0].get("document").is_none());
}

#[tokio::test]
async fn pairs_are_scored_in_their_order() {
    let world = world();
    let score = async |first: Value, second: Value| {
        let body = json!({"model": "fake", "text_1": first, "text_2": second});
        let answer = ask(&world, "/v1/score", body).await;
        let scores: Vec<f64> = answer.json()["data"]
            .as_array()
            .expect("a list")
            .iter()
            .enumerate()
            .map(|(index, item)| {
                assert_eq!((&item["index"], &item["object"]), (&json!(index), &json!("score")));
                item["score"].as_f64().expect("a number")
            })
            .collect();
        (answer, scores)
    };
    let (answer, one) = score(json!("hello"), json!("there")).await;
    check_receipt(&world, &answer, 10).await;
    let (answer, each) = score(json!("hello"), json!(["there", "hello"])).await;
    check_receipt(&world, &answer, 15).await;
    assert_eq!(each[..1], one);
    assert!((each[1] - 1.0).abs() < 1e-6);
    assert_eq!(score(json!(["hello", "there"]), json!(["there", "hello"])).await.1, [one[0], one[0]]);
}

#[tokio::test]
async fn what_cannot_be_computed_is_refused_by_name() {
    let world = world();
    let long = "a".repeat(CONTEXT + 1);
    let many = vec!["a"; 2049];
    let embeddings = [
        (json!({"input": null}), "input", "required"),
        (json!({"input": 7}), "input", "a string or an array"),
        (json!({"input": []}), "input", "empty"),
        (json!({"input": ""}), "input", "empty"),
        (json!({"input": ["a", ""]}), "input", "number 1"),
        (json!({"input": [[]]}), "input[0]", "empty"),
        (json!({"input": [97, 999]}), "input[1]", "999 is not a token id"),
        (json!({"input": ["a", 97]}), "input[1]", "a string"),
        (json!({"input": many}), "input", "2049 entries; at most 2048"),
        (
            json!({"input": ["a", long]}),
            "input",
            "at most 256 tokens, but number 1 of `input` (from 0) has 257",
        ),
        (json!({"encoding_format": "hex"}), "encoding_format", "float or base64"),
        (json!({"dimensions": 0}), "dimensions", "from 1"),
        (json!({"dimensions": 5}), "dimensions", "vectors have 4"),
        (json!({"model": null}), "model", "required"),
        (json!({"max_tokens": 3}), "max_tokens", "unknown"),
    ];
    let rerank = [
        (json!({"query": null}), "query", "required"),
        (json!({"documents": null}), "documents", "required"),
        (json!({"documents": []}), "documents", "empty"),
        (json!({"documents": [1]}), "documents[0]", "`text`"),
        (json!({"documents": [{"title": "x"}]}), "documents[0]", "no `text`"),
        (json!({"documents": [{"text": "x", "title": "x"}]}), "documents[0].title", "unknown"),
        (json!({"documents": many[..2048]}), "documents", "2049 texts; at most 2048"),
        (json!({"top_n": 0}), "top_n", "from 1"),
    ];
    let score = [
        (json!({"text_1": null}), "text_1", "required"),
        (json!({"text_2": []}), "text_2", "empty"),
        (json!({"text_1": ["a", "b"], "text_2": "a"}), "text_2", "as many of both"),
        (json!({"text_1": [1]}), "text_1[0]", "a string"),
    ];
    let bases = [
        ("/v1/embeddings", json!({"model": "fake", "input": "hello"}), embeddings.as_slice()),
        ("/v1/rerank", json!({"model": "fake", "query": "a", "documents": ["b"]}), &rerank),
        ("/v1/score", json!({"model": "fake", "text_1": "a", "text_2": "b"}), &score),
    ];
    for (path, base, cases) in bases {
        for (extra, param, word) in cases {
            let mut body = base.clone();
            body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
            let answer = world.post(path, body).await;
            let error = &answer.json()["error"];
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path} {param}: {error}");
            assert_eq!(error["param"], *param, "{path}: {error}");
            assert!(
                error["message"].as_str().is_some_and(|message| message.contains(word)),
                "{path}: {error}"
            );
        }
    }
    let other = world.post("/v1/embeddings", json!({"model": "other", "input": "a"})).await;
    assert_eq!(other.status, StatusCode::NOT_FOUND);
    // An input may fill the context: nothing is left over for an answer.
    assert_eq!(embed(&world, json!("a".repeat(CONTEXT)), json!({})).await.len(), 1);
}

async fn receipts(world: &World) -> Vec<Value> {
    world.get("/v1/requests").await.json()["data"].as_array().expect("a list").clone()
}

#[tokio::test]
async fn who_hangs_up_or_repeats_a_key_leaves_one_settled_receipt() {
    let step = std::time::Duration::from_millis(20);
    let world = world_with(Options { step, ..Options::default() });
    let inputs: Vec<String> = (0..40).map(|at| format!("{at} {}", "a".repeat(200))).collect();
    let request = || {
        axum::http::Request::post("/v1/embeddings")
            .header("idempotency-key", "once")
            .body(axum::body::Body::from(json!({"model": "fake", "input": inputs}).to_string()))
            .expect("a request")
    };
    {
        let hung_up = tokio::time::timeout(step * 5, world.send(request())).await;
        assert!(hung_up.is_err(), "it takes longer");
    }
    while receipts(&world).await.is_empty() {
        tokio::time::sleep(step).await;
    }
    let again = world.send(request()).await;
    assert_eq!(again.status, StatusCode::CONFLICT, "{}", again.text);
    let receipts = receipts(&world).await;
    assert_eq!((receipts.len(), &receipts[0]["status"]), (1, &json!("cancelled")));
    assert!(audit(world.data_dir.path()).expect("a readable ledger").is_reconciled());
}
