//! The request fields that chat completions and completions share, and their bounds.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::form;
use crate::config::UnknownFields;
use crate::grammar::Form;
use crate::http::fields::{Fields, Invalid, number_in, string_at, token_at};
use crate::http::origin::Asker;
use crate::pipeline::{Ask, Length, Prompt};
use crate::request::{Sampling, Tier};
use crate::text::dialect::Dialect;

/// Bounds that depend on the model and the configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) unknown: UnknownFields,
    pub(crate) vocab_size: usize,
    pub(crate) choices_max: u32,
    /// Of the model's chat template, where it has one.
    pub(crate) dialect: Option<Dialect>,
}

/// Most alternatives a position may report, as in OpenAI's API.
pub(crate) const TOP_LOGPROBS_MAX: i64 = 20;
const STOP_STRINGS_MAX: usize = 16;
const STOP_STRING_BYTES_MAX: usize = 1024;
const STOP_TOKEN_IDS_MAX: usize = 256;
const LOGIT_BIASES_MAX: usize = 1024;
const METADATA_PAIRS_MAX: usize = 16;
const METADATA_KEY_CHARS_MAX: usize = 64;
const METADATA_VALUE_CHARS_MAX: usize = 512;
const USER_CHARS_MAX: usize = 512;

/// How the client wants the answer, apart from what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Delivery {
    pub(crate) stream: bool,
    /// An extra last chunk with the usage, and `usage: null` on the others.
    pub(crate) include_usage: bool,
    /// Token counts so far on every chunk.
    pub(crate) continuous_usage: bool,
    /// Log-probabilities were asked for; where choices are compared, they are there in any case.
    pub(crate) scored: bool,
    /// Each choice's text begins with its prompt.
    pub(crate) echo: bool,
    /// The most likely so many of a prompt's choices are shown; `None`: all.
    pub(crate) best: Option<u32>,
}

/// What all endpoints say of an answer, each in its own fields.
pub(crate) struct Common {
    pub(crate) model: String,
    pub(crate) sampling: Sampling,
    pub(crate) delivery: Delivery,
    pub(crate) choices: u32,
    seed: Option<u64>,
    min_tokens: u32,
    ignore_eos: bool,
    stop_token_ids: Vec<u32>,
    form: Option<(Form, &'static str)>,
    pub(crate) stop: Vec<String>,
    pub(crate) user: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tier: Tier,
}

impl Common {
    /// OpenAI's completions, of chats and of prompts.
    pub(crate) fn read(fields: &mut Fields, rules: &Rules) -> Result<Self, Invalid> {
        let common = Self::read_core(fields, rules)?;
        let choices = fields.integer("n", 1..=i64::from(rules.choices_max))?.unwrap_or(1);
        fields.only("store", &[json!(false)], "answers are never stored")?;
        Ok(Self {
            delivery: delivery(fields, rules.unknown)?,
            choices: u32::try_from(choices).expect("checked against choices_max"),
            form: form::read(fields, rules.unknown)?,
            stop: strings_to_stop_at(fields, "stop")?,
            user: user(fields)?,
            metadata: metadata(fields)?,
            tier: tier(fields)?,
            ..common
        })
    }

    /// What has one name in every API; the rest as if nothing were said of it.
    pub(crate) fn read_core(fields: &mut Fields, rules: &Rules) -> Result<Self, Invalid> {
        let model = fields.string("model")?.ok_or_else(|| {
            Invalid::new("model", "`model` is required: name a model that /v1/models lists")
        })?;
        Ok(Self {
            model,
            sampling: sampling(fields, rules)?,
            delivery: Delivery::default(),
            choices: 1,
            seed: seed(fields)?,
            min_tokens: fields.count("min_tokens", 0)?.unwrap_or(0),
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            stop_token_ids: stop_token_ids(fields, rules)?,
            form: None,
            stop: Vec::new(),
            user: None,
            metadata: BTreeMap::new(),
            tier: Tier::Default,
        })
    }

    /// The request field that says what the answer must look like.
    pub(crate) fn form_param(&self) -> Option<&'static str> {
        self.form.as_ref().map(|(_, param)| *param)
    }

    /// The answer must look like this, by the request field `param`.
    pub(crate) fn must_be(&mut self, form: Form, param: &'static str) {
        self.form = Some((form, param));
    }

    /// Joins the shared fields with what only one endpoint has.
    pub(crate) fn ask(self, prompts: Vec<Prompt>, limit: MaxTokens, asker: Asker) -> Result<Ask, Invalid> {
        if let Some(max) = limit.value
            && self.min_tokens > max
        {
            return Err(Invalid::new(
                "min_tokens",
                format!("`min_tokens` ({}) is over `{}` ({max})", self.min_tokens, limit.param),
            ));
        }
        if let Some((_, param)) = self.form {
            // A text that is complete must be able to end, and can do nothing else.
            let against = if self.ignore_eos { "ignore_eos" } else { "min_tokens" };
            if self.ignore_eos || self.min_tokens > 0 {
                return Err(Invalid::new(
                    against,
                    format!("`{against}` does not go together with `{param}`"),
                ));
            }
        }
        Ok(Ask {
            model: self.model,
            prompts,
            choices: self.choices,
            sampling: self.sampling,
            seed: self.seed,
            length: Length {
                max_tokens: limit.value,
                max_tokens_param: limit.param,
                min_tokens: self.min_tokens,
            },
            ignore_eos: self.ignore_eos,
            stop_token_ids: self.stop_token_ids,
            form: self.form,
            score_prompts: false,
            vectors_of: None,
            stop: self.stop,
            tier: asker.tier(self.tier)?,
            origin: asker.origin(self.user, self.metadata)?,
        })
    }
}

/// `auto` is `default`. Batches are made at an address of their own.
pub(crate) fn tier(fields: &mut Fields) -> Result<Tier, Invalid> {
    Ok(match fields.string("service_tier")?.as_deref() {
        None | Some("auto" | "default") => Tier::Default,
        Some("flex") => Tier::Flex,
        Some("priority") => Tier::Priority,
        Some(other) => {
            let problem =
                format!("`service_tier`: `{other}` is none of `auto`, `default`, `flex` and `priority`");
            return Err(Invalid::new("service_tier", problem));
        }
    })
}

/// `max_tokens`, and the name it came under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MaxTokens {
    pub(crate) value: Option<u32>,
    pub(crate) param: &'static str,
}

impl MaxTokens {
    /// Completions: `max_tokens` alone.
    pub(crate) fn read(fields: &mut Fields) -> Result<Self, Invalid> {
        Ok(Self { value: fields.count("max_tokens", 1)?, param: "max_tokens" })
    }

    /// Chat: `max_completion_tokens` is the newer name of `max_tokens`; both must agree.
    pub(crate) fn read_both(fields: &mut Fields) -> Result<Self, Invalid> {
        let old = Self::read(fields)?;
        match (old.value, fields.count("max_completion_tokens", 1)?) {
            (Some(a), Some(b)) if a != b => Err(Invalid::new(
                "max_completion_tokens",
                format!("`max_tokens` ({a}) and `max_completion_tokens` ({b}) differ; give one of them"),
            )),
            (_, Some(value)) => Ok(Self { value: Some(value), param: "max_completion_tokens" }),
            (_, None) => Ok(old),
        }
    }
}

fn sampling(fields: &mut Fields, rules: &Rules) -> Result<Sampling, Invalid> {
    let defaults = Sampling::default();
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(defaults.top_p);
    if top_p <= 0.0 {
        return Err(Invalid::new("top_p", "`top_p` must be over 0 and at most 1"));
    }
    let repetition_penalty = fields.number("repetition_penalty", 0.0..=10.0)?.unwrap_or(1.0);
    if repetition_penalty <= 0.0 {
        return Err(Invalid::new("repetition_penalty", "`repetition_penalty` must be over 0 (1 = off)"));
    }
    // -1 and 0 both mean "all tokens" to clients in use.
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0).max(0);
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(defaults.temperature),
        top_k: u32::try_from(top_k).expect("checked against u32's range"),
        top_p,
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(defaults.min_p),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        repetition_penalty,
        logit_bias: logit_bias(fields, rules)?,
        seed: 0,
        logprobs: None,
    })
}

fn logit_bias(fields: &mut Fields, rules: &Rules) -> Result<Vec<(u32, f32)>, Invalid> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let mut biases = BTreeMap::new();
    for (path, value) in map.into_entries() {
        let name = path.strip_prefix("logit_bias.").unwrap_or(&path);
        let id = name.parse().map(|id: u32| json!(id)).map_err(|_| {
            Invalid::new(&path, format!("`{path}`: the keys of `logit_bias` are token ids, as \"50256\""))
        })?;
        let id = token_at(&path, &id, rules.vocab_size)?;
        biases.insert(id, number_in(&path, &value, -100.0..=100.0)?);
    }
    if biases.len() > LOGIT_BIASES_MAX {
        return Err(Invalid::new("logit_bias", format!("`logit_bias` has over {LOGIT_BIASES_MAX} entries")));
    }
    Ok(biases.into_iter().collect())
}

/// Any 64-bit integer, signed or not: receipts print seeds unsigned, and that form must be accepted too.
fn seed(fields: &mut Fields) -> Result<Option<u64>, Invalid> {
    match fields.take("seed") {
        None => Ok(None),
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(seed), _) => Ok(Some(seed)),
            (None, Some(negative)) => Ok(Some(negative.cast_unsigned())),
            (None, None) => Err(Invalid::new("seed", "`seed` must be a 64-bit integer")),
        },
    }
}

/// Stop strings, in the field that the API has for them.
pub(crate) fn strings_to_stop_at(fields: &mut Fields, name: &str) -> Result<Vec<String>, Invalid> {
    let strings = match fields.take(name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => {
            let strings = items.into_iter().enumerate();
            strings
                .map(|(i, item)| string_at(&format!("{name}[{i}]"), item))
                .collect::<Result<Vec<_>, _>>()?
        }
        Some(Value::String(one)) => vec![one],
        Some(_) => {
            return Err(Invalid::new(name, format!("`{name}` must be a string or an array of strings")));
        }
    };
    if strings.len() > STOP_STRINGS_MAX {
        return Err(Invalid::new(name, format!("`{name}` takes at most {STOP_STRINGS_MAX} strings")));
    }
    if strings.iter().any(|text| text.is_empty() || text.len() > STOP_STRING_BYTES_MAX) {
        let message = format!("`{name}`: a stop string has 1 to {STOP_STRING_BYTES_MAX} bytes");
        return Err(Invalid::new(name, message));
    }
    Ok(strings)
}

fn stop_token_ids(fields: &mut Fields, rules: &Rules) -> Result<Vec<u32>, Invalid> {
    let items = fields.array("stop_token_ids")?.unwrap_or_default();
    if items.len() > STOP_TOKEN_IDS_MAX {
        return Err(Invalid::new(
            "stop_token_ids",
            format!("`stop_token_ids` has over {STOP_TOKEN_IDS_MAX} ids"),
        ));
    }
    let numbered = items.iter().enumerate();
    numbered.map(|(i, item)| token_at(&format!("stop_token_ids[{i}]"), item, rules.vocab_size)).collect()
}

fn delivery(fields: &mut Fields, unknown: UnknownFields) -> Result<Delivery, Invalid> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let Some(mut options) = fields.object("stream_options")? else {
        return Ok(Delivery { stream, ..Delivery::default() });
    };
    if !stream {
        return Err(Invalid::new(
            "stream_options",
            "`stream_options` is only for requests with `stream: true`",
        ));
    }
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    let continuous_usage = options.boolean("continuous_usage_stats")?.unwrap_or(false);
    options.only("include_obfuscation", &[json!(false)], "streams are not padded")?;
    options.finish(unknown)?;
    Ok(Delivery { stream, include_usage, continuous_usage, ..Delivery::default() })
}

/// Who the client asks for.
pub(crate) fn user(fields: &mut Fields) -> Result<Option<String>, Invalid> {
    let user = text_up_to(fields, "user", USER_CHARS_MAX)?;
    let safety_identifier = text_up_to(fields, "safety_identifier", USER_CHARS_MAX)?;
    Ok(user.or(safety_identifier))
}

/// Names and values to book the request under.
pub(crate) fn metadata(fields: &mut Fields) -> Result<BTreeMap<String, String>, Invalid> {
    let Some(map) = fields.object("metadata")? else { return Ok(BTreeMap::new()) };
    let mut pairs = BTreeMap::new();
    for (path, value) in map.into_entries() {
        let key = path.strip_prefix("metadata.").unwrap_or(&path).to_owned();
        if key.chars().count() > METADATA_KEY_CHARS_MAX {
            return Err(Invalid::new(
                "metadata",
                format!("a key of `metadata` has over {METADATA_KEY_CHARS_MAX} characters"),
            ));
        }
        let value = string_at(&path, value)?;
        if value.chars().count() > METADATA_VALUE_CHARS_MAX {
            return Err(Invalid::new(
                &path,
                format!("`{path}` has over {METADATA_VALUE_CHARS_MAX} characters"),
            ));
        }
        pairs.insert(key, value);
    }
    if pairs.len() > METADATA_PAIRS_MAX {
        return Err(Invalid::new("metadata", format!("`metadata` has over {METADATA_PAIRS_MAX} pairs")));
    }
    Ok(pairs)
}

fn text_up_to(fields: &mut Fields, name: &str, chars_max: usize) -> Result<Option<String>, Invalid> {
    let text = fields.string(name)?;
    match text {
        Some(text) if text.chars().count() > chars_max => {
            Err(Invalid::new(name, format!("`{name}` has over {chars_max} characters")))
        }
        text => Ok(text),
    }
}
