//! Directories whose config.json asks for what cannot be served, or contradicts the weights: each an error that
//! names the file's key and what is wrong.

use std::fs;

use obol_kernels::Cpu;
use obol_models::load::LoadOptions;
use obol_models::{Decoder, ModelFiles};
use serde_json::{Value, json};

use crate::support::fixture;

/// Loads the family's directory with these values in its config.json; null takes a key away.
fn load(family: &str, changes: &[(&str, Value)]) -> Result<(), String> {
    let from = fixture("families").join(family);
    let directory = tempfile::tempdir().expect("a temporary directory");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), directory.path().join(file)).expect("a copy");
    }
    let path = directory.path().join("config.json");
    let text = fs::read_to_string(&path).expect("the file");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    let values = config.as_object_mut().expect("an object");
    for (key, value) in changes {
        match value {
            Value::Null => drop(values.remove(*key)),
            value => drop(values.insert((*key).into(), value.clone())),
        }
    }
    fs::write(&path, config.to_string()).expect("the file");
    let files = ModelFiles::open(directory.path()).map_err(|error| error.to_string())?;
    let cpu = Cpu::new(1);
    Decoder::load(&files, cpu, &LoadOptions::default()).map(drop).map_err(|error| error.to_string())
}

#[track_caller]
fn check(family: &str, changes: &[(&str, Value)], message: &str) {
    match load(family, changes) {
        Ok(()) => panic!("{family} with {changes:?} loaded, expected: {message}"),
        Err(error) => assert!(error.contains(message), "expected: {message}\ngot: {error}"),
    }
}

#[test]
fn keys_that_are_missing_or_wrong_are_named() {
    assert_eq!(load("llama", &[]), Ok(()));
    for key in ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
    {
        check("llama", &[(key, Value::Null)], &format!("config.json: no key `{key}`"));
        check("llama", &[(key, json!("64"))], &format!("`{key}` should hold a number but holds \"64\""));
        check("llama", &[(key, json!(-1))], &format!("`{key}` should hold an unsigned 32-bit integer"));
        check("llama", &[(key, json!(0))], &format!("`{key}`: 0 is outside 1 to"));
        check("llama", &[(key, json!(4_000_000_000_u64))], &format!("`{key}`: 4000000000 is outside 1 to"));
    }
    check("llama", &[("max_position_embeddings", json!(1 << 30))], "`max_position_embeddings`: 1073741824");
    check("llama", &[("rms_norm_eps", json!(-1.0))], "`rms_norm_eps`: -1 is no epsilon");
    check("llama", &[("num_key_value_heads", json!(3))], "3 kv heads do not divide 4 heads");
    check("llama", &[("model_type", Value::Null)], "no key `model_type`");
    check("llama", &[("model_type", json!("mamba"))], "`mamba` is not supported; supported: llama, qwen2");
}

#[test]
fn what_would_be_another_model_is_refused_by_name() {
    check(
        "llama",
        &[("hidden_act", json!("relu2"))],
        "`hidden_act`: `relu2` is not supported; supported: silu",
    );
    check("llama", &[("clip_qkv", json!(8.0))], "`clip_qkv`: 8.0 is not supported");
    check("qwen2", &[("mlp_bias", json!(true))], "`mlp_bias`: a qwen2 model has none");
    let quantised = json!({"quant_method": "bitsandbytes"});
    check("llama", &[("quantization_config", quantised)], "`bitsandbytes` is not supported");
    check(
        "llama",
        &[("num_local_experts", json!(8))],
        "`num_local_experts`: 8 experts: a llama model has none",
    );
    check(
        "mixtral",
        &[("num_local_experts", json!(1 << 20))],
        "`num_local_experts`: 1048576 is outside 1 to",
    );
    check("mixtral", &[("num_experts_per_tok", json!(5))], "`num_experts_per_tok`: 5 of 4 experts");
    check(
        "qwen2_window",
        &[("layer_types", json!(["full_attention"]))],
        "`layer_types`: 1 values for 3 layers",
    );
    let kinds = json!(["full_attention", "linear_attention", "full_attention"]);
    check("qwen2_window", &[("layer_types", kinds)], "\"linear_attention\" is not supported");
    check("gpt2", &[("scale_attn_by_inverse_layer_idx", json!(true))], "`scale_attn_by_inverse_layer_idx`");
    let mixed = json!(["full_attention", "sliding_attention"]);
    check("llama", &[("layer_types", mixed)], "`layer_types`: contradicts `sliding_window`");
}

#[test]
fn ropes_that_are_not_known_are_refused_by_name() {
    let rope = |value: Value| [("rope_parameters", value)];
    let kind = |kind: &str| rope(json!({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}));
    check(
        "llama",
        &kind("dynamic"),
        "`rope_parameters.rope_type`: `dynamic` is not supported; supported: default",
    );
    check("llama", &rope(json!({"rope_type": "linear"})), "`rope_parameters.factor`: missing");
    check("llama", &rope(json!({"rope_type": "linear", "factor": -2})), "-2 is no positive number");
    check("llama", &rope(json!({"partial_rotary_factor": 0.5})), "0.5 is not supported of a llama model");
    check("llama", &rope(json!("linear")), "`rope_parameters` should hold an object");
    let low = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4});
    check("llama", &rope(low), "`rope_parameters.high_freq_factor`: 4 is not over 4");
    let long = json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]});
    check("phi3_longrope_short", &rope(long), "`rope_parameters.short_factor`: 1 values, expected 8 numbers");
}

/// Transformers 4 wrote the same models otherwise.
#[test]
fn older_configurations_are_the_same_models() {
    let without = |key: &'static str| (key, Value::Null);
    let scaling = json!({"type": "linear", "factor": 4.0});
    let older = [without("rope_parameters"), ("rope_theta", json!(1e4)), ("rope_scaling", scaling)];
    assert_eq!(load("llama_linear_rope", &older), Ok(()));
    let older = [without("rope_parameters"), without("layer_types"), without("dtype")];
    assert_eq!(load("qwen3", &older), Ok(()));
    assert_eq!(load("gemma", &[without("rope_parameters"), ("hidden_act", json!("gelu"))]), Ok(()));
}

#[test]
fn tensors_that_contradict_the_configuration_are_named() {
    check("llama", &[("num_hidden_layers", json!(3))], "no tensor `model.layers.2.");
    check("llama", &[("num_hidden_layers", json!(1))], "`model.layers.1.");
    check(
        "llama",
        &[("intermediate_size", json!(128))],
        "mlp.gate_proj.weight` should have the shape [128, 64]",
    );
    check(
        "llama",
        &[("vocab_size", json!(161))],
        "`model.embed_tokens.weight` should have the shape [161, 64]",
    );
    check("llama", &[("tie_word_embeddings", json!(true))], "`lm_head.weight`: the model uses");
    check("qwen2", &[("tie_word_embeddings", json!(false))], "no tensor `lm_head.weight`");
    check("llama", &[("attention_bias", json!(true))], "no tensor `model.layers.0.self_attn.q_proj.bias`");
}
