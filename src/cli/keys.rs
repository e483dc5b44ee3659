//! `obol keys`: makes, shows and changes keys in the data directory, beside a running server or without one.

mod render;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Directories, Failure, print};
use crate::clock::SystemClock;
use crate::config::{PlaceFlags, data_dir};
use crate::control::{
    Actor, AuditEntry, AuditPage, BadSetting, Control, ControlError, Key, KeyId, KeySettings, Secret,
    SecretHash, Span,
};
use crate::ledger;
use crate::pipeline;
use crate::request::Tag;
use crate::units::Picos;

#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Make a key and print its secret, once: it is kept nowhere
    #[command(
        after_help = "Example:\n  obol keys create --alias search-prod --team search --models default --max-budget 25.00 \\\n    \
                      --budget-duration 30d --duration 90d"
    )]
    Create {
        #[command(flatten)]
        settings: Box<SettingFlags>,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Keys that are in force, with what each has spent
    #[command(after_help = "Example:\n  obol keys list --json")]
    List {
        /// Keys that were revoked too
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// One key
    #[command(after_help = "Example:\n  obol keys show search-prod")]
    Show {
        /// Id, alias or token
        key: String,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Change a key: what is not named stays as it is
    #[command(
        after_help = "Example:\n  obol keys update search-prod --max-budget 50 --clear expires --clear team\n  obol keys update search-prod --block"
    )]
    Update {
        /// Id, alias or token
        key: String,
        #[command(flatten)]
        settings: Box<SettingFlags>,
        /// Setting to take away: alias, expires, models, max_tokens, max_budget, soft_budget, budget_duration,
        /// tpm_limit, rpm_limit, max_parallel_requests, require_tags, metadata, or a tag's name
        #[arg(long, value_name = "SETTING")]
        clear: Vec<String>,
        /// Refuse the key until it is unblocked
        #[arg(long, conflicts_with = "unblock")]
        block: bool,
        /// Take the key again
        #[arg(long)]
        unblock: bool,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Delete keys for good; their ids stay on receipts
    #[command(after_help = "Example:\n  obol keys revoke search-prod")]
    Revoke {
        /// Ids, aliases or tokens: all of them or none
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<String>,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Give a key a new secret, and print it once
    #[command(after_help = "Example:\n  obol keys rotate search-prod --grace 24h")]
    Rotate {
        /// Id, alias or token
        key: String,
        /// How long the secret before works too, like 24h [default: not at all]
        #[arg(long, value_name = "SPAN")]
        grace: Option<Span>,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Who changed what and when, newest first
    #[command(after_help = "Example:\n  obol keys log --key search-prod --json")]
    Log {
        /// Only of this key: id, alias or token
        #[arg(long)]
        key: Option<String>,
        /// Most rows
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        limit: u32,
        #[command(flatten)]
        output: OutputFlags,
    },
}

#[derive(Debug, Args)]
pub(super) struct OutputFlags {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: PlaceFlags,
}

#[derive(Debug, Args)]
pub(super) struct SettingFlags {
    /// Name to know the key by
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// How long it works from now on, like 30m, 12h, 90d or 1mo [default: for good]
    #[arg(long, value_name = "SPAN")]
    duration: Option<Span>,
    /// Models that it may ask for, several with commas [default: all]
    #[arg(long, value_delimiter = ',', value_name = "MODELS")]
    models: Option<Vec<String>>,
    /// Most tokens that one request may have generated
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// Most that it may spend in a --budget-duration; without one, ever
    #[arg(long, value_name = "MONEY", value_parser = Picos::parse)]
    max_budget: Option<Picos>,
    /// Spend from which on somebody is told
    #[arg(long, value_name = "MONEY", value_parser = Picos::parse)]
    soft_budget: Option<Picos>,
    /// Span after which a budget starts anew, like 1h, 1d or 1mo
    #[arg(long, value_name = "SPAN")]
    budget_duration: Option<Span>,
    /// Most tokens a minute
    #[arg(long, value_name = "TOKENS")]
    tpm_limit: Option<u64>,
    /// Most requests a minute
    #[arg(long, value_name = "REQUESTS")]
    rpm_limit: Option<u64>,
    /// Most requests at the same time
    #[arg(long, value_name = "REQUESTS")]
    max_parallel_requests: Option<u32>,
    /// Team that its requests are booked under; the key's tags win over what requests say
    #[arg(long)]
    team: Option<String>,
    /// Feature that its requests are booked under
    #[arg(long)]
    feature: Option<String>,
    /// Environment that its requests are booked under
    #[arg(long)]
    environment: Option<String>,
    /// User that its requests are booked under
    #[arg(long)]
    user: Option<String>,
    /// Cost centre that its requests are booked under
    #[arg(long)]
    cost_center: Option<String>,
    /// Tags without which its requests are refused: team, feature, environment, user, cost_center, task
    #[arg(long, value_delimiter = ',', value_name = "TAGS")]
    require_tags: Option<Vec<Tag>>,
    /// Notes of your own, as a JSON object
    #[arg(long, value_name = "JSON", value_parser = object)]
    metadata: Option<Value>,
}

fn object(text: &str) -> Result<Value, String> {
    match serde_json::from_str(text) {
        Ok(value @ Value::Object(_)) => Ok(value),
        _ => Err("write a JSON object such as {\"owner\": \"ann\"}".into()),
    }
}

impl SettingFlags {
    /// What is named is set; the rest stays.
    fn apply(self, set: &mut KeySettings, control: &Control) {
        fn put<T>(setting: &mut Option<T>, given: Option<T>) {
            if given.is_some() {
                *setting = given;
            }
        }
        put(&mut set.alias, self.alias);
        put(&mut set.expires, self.duration.map(|duration| duration.after(control.now())));
        put(&mut set.max_tokens, self.max_tokens);
        put(&mut set.max_budget, self.max_budget);
        put(&mut set.soft_budget, self.soft_budget);
        put(&mut set.budget_duration, self.budget_duration);
        put(&mut set.tpm_limit, self.tpm_limit);
        put(&mut set.rpm_limit, self.rpm_limit);
        put(&mut set.max_parallel_requests, self.max_parallel_requests);
        set.models = self.models.unwrap_or_else(|| std::mem::take(&mut set.models));
        set.require_tags = self.require_tags.unwrap_or_else(|| std::mem::take(&mut set.require_tags));
        let tags = [
            (Tag::Team, self.team),
            (Tag::Feature, self.feature),
            (Tag::Environment, self.environment),
            (Tag::User, self.user),
            (Tag::CostCenter, self.cost_center),
        ];
        set.tags.extend(tags.into_iter().filter_map(|(tag, value)| Some((tag, value?))));
        if let Some(Value::Object(metadata)) = self.metadata {
            set.metadata = metadata;
        }
    }
}

fn clear(set: &mut KeySettings, name: &str) -> Result<(), BadSetting> {
    match name {
        "alias" => set.alias = None,
        "expires" => set.expires = None,
        "models" => set.models.clear(),
        "max_tokens" => set.max_tokens = None,
        "max_budget" => set.max_budget = None,
        "soft_budget" => set.soft_budget = None,
        "budget_duration" => set.budget_duration = None,
        "tpm_limit" => set.tpm_limit = None,
        "rpm_limit" => set.rpm_limit = None,
        "max_parallel_requests" => set.max_parallel_requests = None,
        "require_tags" => set.require_tags.clear(),
        "metadata" => set.metadata.clear(),
        tag => {
            let tag: Tag = tag
                .parse()
                .map_err(|_| BadSetting::new("--clear", format!("`{name}` is no setting of a key")))?;
            set.tags.remove(&tag);
        }
    }
    Ok(())
}

/// The data directory, its keys, and how to print.
struct Desk {
    dir: PathBuf,
    json: bool,
    control: Control,
}

impl Desk {
    fn open(output: &OutputFlags, directories: &Directories, make: bool) -> Result<Self, Failure> {
        let dir = data_dir(&output.places, directories.data.clone()).map_err(Failure::usage)?;
        let clock = Arc::new(SystemClock::start());
        let opened = if make { Control::open(&dir, clock) } else { Control::open_existing(&dir, clock) };
        Ok(Self { control: opened.map_err(Failure::failed)?, dir, json: output.json })
    }

    fn living(&self, reference: &str) -> Result<KeyId, Failure> {
        let (key, _) = self.control.resolve(reference)?;
        match key.deleted {
            None => Ok(key.id.clone()),
            Some(_) => Err(ControlError::NoSuchKey { reference: reference.to_owned() }.into()),
        }
    }

    /// Prints one of the two.
    fn print(&self, text: &str, json: &Value) -> Result<ExitCode, Failure> {
        print(&if self.json { json.to_string() } else { text.to_owned() })?;
        Ok(ExitCode::SUCCESS)
    }

    fn print_secret(&self, secret: &Secret, key: &Key) -> Result<ExitCode, Failure> {
        let mut json = render::json(key, secret.hash(), &BTreeMap::new(), None);
        json["key"] = json!(secret.reveal());
        self.print(&render::secret(secret, key), &json)
    }

    fn print_key(&self, key: &Key, token: SecretHash) -> Result<ExitCode, Failure> {
        let spent = ledger::spent_by_keys(&self.dir, &[&key.id.0]).map_err(Failure::failed)?;
        let all = self.control.foreseen()?;
        let foreseen = pipeline::foreseen(&all, key, self.control.now());
        let json = render::json(key, token, &spent[0], foreseen);
        self.print(&render::card(key, token, &spent[0], foreseen), &json)
    }
}

impl From<ControlError> for Failure {
    /// A setting that cannot be is wrong usage.
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::BadSetting(bad) => Self::Usage(bad.to_string()),
            other => Self::Failed(other.to_string()),
        }
    }
}

pub(super) fn run(command: KeysCommand, directories: &Directories) -> Result<ExitCode, Failure> {
    let actor = Actor::cli();
    let open = |output: &OutputFlags| Desk::open(output, directories, false);
    match command {
        KeysCommand::Create { settings, output } => {
            let desk = Desk::open(&output, directories, true)?;
            let mut set = KeySettings::default();
            settings.apply(&mut set, &desk.control);
            let (secret, key) = desk.control.create(&actor, set)?;
            desk.print_secret(&secret, &key)
        }
        KeysCommand::List { all, output } => list(&open(&output)?, all),
        KeysCommand::Show { key, output } => {
            let desk = open(&output)?;
            let (key, token) = desk.control.resolve(&key)?;
            desk.print_key(&key, token)
        }
        KeysCommand::Update { key, settings, clear: cleared, block, unblock, output } => {
            let desk = open(&output)?;
            let id = desk.living(&key)?;
            desk.control.update(&actor, &id, |set| {
                cleared.iter().try_for_each(|name| clear(set, name))?;
                settings.apply(set, &desk.control);
                set.blocked = (set.blocked || block) && !unblock;
                Ok(())
            })?;
            let (key, token) = desk.control.resolve(&id.0)?;
            desk.print_key(&key, token)
        }
        KeysCommand::Revoke { keys, output } => revoke(&open(&output)?, &actor, &keys),
        KeysCommand::Rotate { key, grace, output } => {
            let desk = open(&output)?;
            let (secret, key) = desk.control.rotate(&actor, &desk.living(&key)?, grace)?;
            desk.print_secret(&secret, &key)
        }
        KeysCommand::Log { key, limit, output } => {
            let desk = open(&output)?;
            let target =
                key.map(|key| desk.control.resolve(&key).map(|(key, _)| key.id.0.clone())).transpose()?;
            let entries = desk.control.trail(&AuditPage { target, before: None, limit })?;
            let json = entries.iter().map(AuditEntry::to_json).collect();
            desk.print(&render::log(&entries), &Value::Array(json))
        }
    }
}

fn list(desk: &Desk, all: bool) -> Result<ExitCode, Failure> {
    let mut keys = desk.control.keys()?;
    keys.retain(|(key, _)| all || key.deleted.is_none());
    let ids: Vec<&str> = keys.iter().map(|(key, _)| key.id.0.as_str()).collect();
    let spent = ledger::spent_by_keys(&desk.dir, &ids).map_err(Failure::failed)?;
    let (all, now) = (desk.control.foreseen()?, desk.control.now());
    let json = |((key, token), spent): (&(Arc<Key>, SecretHash), _)| {
        render::json(key, *token, spent, pipeline::foreseen(&all, key, now))
    };
    let json = keys.iter().zip(&spent).map(json).collect();
    desk.print(&render::table(&keys, &spent, now), &Value::Array(json))
}

fn revoke(desk: &Desk, actor: &Actor, named: &[String]) -> Result<ExitCode, Failure> {
    let mut ids: Vec<KeyId> = Vec::new();
    for name in named {
        let id = desk.living(name)?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    desk.control.delete(actor, &ids)?;
    let ids: Vec<&str> = ids.iter().map(|id| id.0.as_str()).collect();
    let text = ids.iter().map(|id| format!("revoked {id}\n")).collect::<String>();
    desk.print(&text, &json!({"revoked": ids}))
}
