//! Who may use the server and what they may spend: keys, budgets, and the trail of who changed keys.
//!
//! Does: keep keys in `control.db`, find the key of a secret, say what a request is booked under.
//! Does not know: HTTP, the engine, the ledger; what a key has spent is the ledger's to say.
//! Invariants: a change that was acknowledged is durable and in the trail; one made by this handle is in force when
//! it returns, one made by another process within `LOOK_EVERY`; secrets are not kept.
//!
//! All of it may wait for the disk, except `find`, which does so only while another process changes keys.

pub mod alerts;
pub mod anomaly;
mod audit_trail;
pub mod budgets;
pub mod forecast;
pub mod foreseen;
mod keys;
pub mod limits;
pub mod outbox;
pub mod policy;
pub mod rules;
mod store;
pub mod tasks;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod traffic;
pub mod window;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

pub use audit_trail::{Action, Actor, AuditEntry, AuditPage};
pub use keys::{
    BadSetting, ConfiguredKey, KEY_TAGS, Key, KeyId, KeySettings, SECRET_PREFIX, Secret, SecretHash, Span,
    SpanUnit, rfc3339, short,
};

use crate::clock::Clock;
use crate::units::UnixNanos;
use store::{Deed, Store, StoredKey};

/// How long another process's change may stay unnoticed.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Why keys could not be read or changed; nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("data directory {path}: {source}; make it writable, or choose another with --data-dir")]
    DataDir { path: PathBuf, source: std::io::Error },
    #[error("there are no keys at {path} yet; `obol keys create` makes the first one")]
    NoKeys { path: PathBuf },
    #[error("{path} is not a file of keys of ours; move it away or choose another --data-dir")]
    NotOurs { path: PathBuf },
    #[error("{path} has schema version {found}, this build reads up to 2; use the build that wrote it")]
    SchemaVersion { path: PathBuf, found: i64 },
    #[error("{path} is damaged ({detail}); restore it from a backup, nothing was changed")]
    Corrupt { path: PathBuf, detail: String },
    #[error("{path}: the disk is full; nothing was changed")]
    DiskFull { path: PathBuf },
    #[error("{path}: {source}; nothing was changed")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error("no key `{reference}`; name one by its id, alias, token or secret")]
    NoSuchKey { reference: String },
    #[error("another key has the alias `{alias}`")]
    AliasTaken { alias: String },
    #[error(transparent)]
    BadSetting(#[from] BadSetting),
    #[error("the system gives no random bytes for a secret: {0}")]
    Random(getrandom::Error),
}

/// Why a secret opens nothing.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    #[error("the API key given is not known here, or was revoked")]
    Unknown,
    #[error("the API key {name} expired at {}", rfc3339(*.at))]
    Expired { name: String, at: UnixNanos },
    #[error("the API key {name} is blocked")]
    Blocked { name: String },
    /// The keys cannot be read: whether it was revoked is not known.
    #[error("keys cannot be read at the moment; retry later")]
    Unreadable(#[from] ControlError),
}

/// The keys that are there, and where each secret leads.
#[derive(Default)]
struct Ring {
    by_id: BTreeMap<KeyId, Entry>,
    by_hash: HashMap<SecretHash, KeyId>,
    /// The last change of a key that is here.
    latest: i64,
}

struct Entry {
    key: Arc<Key>,
    hash: SecretHash,
    old: Option<(SecretHash, UnixNanos)>,
    changed: i64,
}

impl Ring {
    /// Without effect where a later state of the key is known.
    fn put(&mut self, stored: StoredKey) {
        let StoredKey { key, hash, old, changed } = stored;
        let id = key.id.clone();
        self.latest = self.latest.max(changed);
        if self.by_id.get(&id).is_some_and(|known| known.changed >= changed) {
            return;
        }
        if let Some(before) = self.by_id.remove(&id) {
            self.by_hash.remove(&before.hash);
            if let Some((hash, _)) = before.old {
                self.by_hash.remove(&hash);
            }
        }
        if let Some((hash, _)) = old {
            self.by_hash.insert(hash, id.clone());
        }
        self.by_hash.insert(hash, id.clone());
        self.by_id.insert(id, Entry { key: Arc::new(key), hash, old, changed });
    }

    fn by_hash(&self, hash: SecretHash, now: UnixNanos) -> Option<&Entry> {
        let entry = self.by_id.get(self.by_hash.get(&hash)?)?;
        let in_force = entry.hash == hash || entry.old.is_some_and(|(_, until)| now < until);
        in_force.then_some(entry)
    }
}

impl Entry {
    fn usable(&self, now: UnixNanos) -> Result<Arc<Key>, Denied> {
        let key = &self.key;
        let name = || key.name.clone();
        match key.settings.expires {
            _ if key.deleted.is_some() => Err(Denied::Unknown),
            _ if key.settings.blocked => Err(Denied::Blocked { name: name() }),
            Some(at) if key.is_expired(now) => Err(Denied::Expired { name: name(), at }),
            _ => Ok(Arc::clone(key)),
        }
    }
}

/// The side that looks for changes.
struct Watch {
    reader: Store,
    /// `None` before the first look.
    version: Option<i64>,
    /// The last row of the trail that the ring knows.
    seen: i64,
}

struct Inner {
    clock: Arc<dyn Clock>,
    /// Taken for changes; they may wait for the disk.
    writer: Mutex<Store>,
    watch: Mutex<Watch>,
    /// On the monotonic clock, when the last look began that is over; 0 before the first.
    looked: AtomicU64,
    ring: RwLock<Ring>,
}

/// Handle to the keys of a data directory; cheap to clone.
#[derive(Clone)]
pub struct Control(Arc<Inner>);

impl Control {
    /// Opens the keys of a data directory, and makes what is missing.
    ///
    /// # Errors
    /// Says what is wrong with the directory or the file; nothing is overwritten.
    pub fn open(data_dir: &Path, clock: Arc<dyn Clock>) -> Result<Self, ControlError> {
        let writer = Store::open(data_dir)?;
        let reader = Store::open_for_reading(data_dir)?;
        let watch = Watch { reader, version: None, seen: 0 };
        let control = Self(Arc::new(Inner {
            clock,
            writer: Mutex::new(writer),
            watch: Mutex::new(watch),
            looked: AtomicU64::new(0),
            ring: RwLock::default(),
        }));
        control.look()?;
        Ok(control)
    }

    /// `open` where there are keys already.
    ///
    /// # Errors
    /// `NoKeys` where there are none, and as `open`.
    pub fn open_existing(data_dir: &Path, clock: Arc<dyn Clock>) -> Result<Self, ControlError> {
        drop(Store::open_for_reading(data_dir)?);
        Self::open(data_dir, clock)
    }

    /// Takes up what has changed in the file.
    fn look(&self) -> Result<(), ControlError> {
        self.look_with(&mut lock(&self.0.watch))
    }

    fn look_with(&self, watch: &mut Watch) -> Result<(), ControlError> {
        let began = self.0.clock.now().0;
        let version = Some(watch.reader.data_version()?);
        if version != watch.version {
            let (changed, seen) = watch.reader.keys_changed_after(watch.seen)?;
            let mut ring = self.0.ring.write().unwrap_or_else(PoisonError::into_inner);
            changed.into_iter().for_each(|stored| ring.put(stored));
            drop(ring);
            (watch.version, watch.seen) = (version, seen);
        }
        self.0.looked.store(began, Ordering::Release);
        Ok(())
    }

    /// Takes it up unless that was done a moment ago.
    fn look_if_due(&self) -> Result<(), ControlError> {
        let due = || {
            let since = self.0.clock.now().0.saturating_sub(self.0.looked.load(Ordering::Acquire));
            u128::from(since) >= LOOK_EVERY.as_nanos()
        };
        if !due() {
            return Ok(());
        }
        let mut watch = lock(&self.0.watch);
        // Another request may have looked while this one waited.
        if due() { self.look_with(&mut watch) } else { Ok(()) }
    }

    /// The key that a secret belongs to, if it may be used now.
    ///
    /// # Errors
    /// `Denied` says why not.
    pub fn find(&self, secret: &str) -> Result<Arc<Key>, Denied> {
        self.look_if_due()?;
        let now = self.0.clock.wall();
        let hash = SecretHash::of(secret);
        let read = || self.0.ring.read().unwrap_or_else(PoisonError::into_inner);
        let mut ring = read();
        if ring.by_hash(hash, now).is_none() {
            // It may have been made a moment ago.
            drop(ring);
            self.look()?;
            ring = read();
        }
        ring.by_hash(hash, now).ok_or(Denied::Unknown)?.usable(now)
    }

    /// The key of this id, if it may be used now.
    ///
    /// # Errors
    /// As `find`.
    pub fn usable(&self, id: &KeyId) -> Result<Arc<Key>, Denied> {
        self.look_if_due()?;
        let ring = self.0.ring.read().unwrap_or_else(PoisonError::into_inner);
        ring.by_id.get(id).ok_or(Denied::Unknown)?.usable(self.0.clock.wall())
    }

    /// The key that an administrator means by a secret, its hash (the token), an id or an alias; with its token.
    /// Deleted keys are found by all but their alias.
    ///
    /// # Errors
    /// `NoSuchKey`, or when the file cannot be read.
    pub fn resolve(&self, reference: &str) -> Result<(Arc<Key>, SecretHash), ControlError> {
        self.look()?;
        let now = self.0.clock.wall();
        let ring = self.0.ring.read().unwrap_or_else(PoisonError::into_inner);
        let by_id = || ring.by_id.get(&KeyId(reference.to_owned()));
        let by_token = || ring.by_hash(SecretHash::parse(reference)?, now);
        let by_secret = || ring.by_hash(SecretHash::of(reference), now);
        let by_alias = || {
            let has = |entry: &&Entry| {
                entry.key.deleted.is_none() && entry.key.settings.alias.as_deref() == Some(reference)
            };
            ring.by_id.values().find(has)
        };
        let found = by_id().or_else(by_token).or_else(by_secret).or_else(by_alias);
        let entry = found.ok_or_else(|| {
            // What was meant as a secret is not repeated.
            let reference = if reference.starts_with("sk-") { "sk-..." } else { reference };
            ControlError::NoSuchKey { reference: reference.to_owned() }
        })?;
        Ok((Arc::clone(&entry.key), entry.hash))
    }

    /// All keys, deleted ones too, oldest first, each with its token.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn keys(&self) -> Result<Vec<(Arc<Key>, SecretHash)>, ControlError> {
        self.look()?;
        let ring = self.0.ring.read().unwrap_or_else(PoisonError::into_inner);
        Ok(ring.by_id.values().map(|entry| (Arc::clone(&entry.key), entry.hash)).collect())
    }

    /// The keys that have changed after the change of this number, or all of them; with the number of the last one.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn changed_since(&self, seen: Option<i64>) -> Result<(i64, Vec<Arc<Key>>), ControlError> {
        self.look_if_due()?;
        let ring = self.0.ring.read().unwrap_or_else(PoisonError::into_inner);
        if seen == Some(ring.latest) {
            return Ok((ring.latest, Vec::new()));
        }
        let is_news = |entry: &&Entry| seen.is_none_or(|seen| entry.changed > seen);
        Ok((ring.latest, ring.by_id.values().filter(is_news).map(|entry| Arc::clone(&entry.key)).collect()))
    }

    /// Now, as keys expire by it.
    #[must_use]
    pub fn now(&self) -> UnixNanos {
        self.0.clock.wall()
    }

    /// A new key, and its secret, which nobody can ask for again.
    ///
    /// # Errors
    /// When a setting cannot be, the alias is taken, or nothing could be written.
    pub fn create(&self, actor: &Actor, settings: KeySettings) -> Result<(Secret, Arc<Key>), ControlError> {
        settings.check()?;
        let secret = Secret::draw().map_err(ControlError::Random)?;
        let at = self.now();
        let (created_by, updated_by) = (actor.as_str().to_owned(), actor.as_str().to_owned());
        let key = Key {
            id: KeyId::new(),
            name: secret.name(),
            settings,
            created: at,
            created_by,
            updated: at,
            updated_by,
            deleted: None,
        };
        let new = StoredKey { key, hash: secret.hash(), old: None, changed: 0 };
        let deed = Deed { at, actor, action: Action::Created };
        let stored = lock(&self.0.writer).transact(|change| change.write(&deed, None, new))?;
        Ok((secret, self.take_up(stored)))
    }

    /// Changes settings: `change` gets them as they stand, whoever changed them last.
    ///
    /// # Errors
    /// What `change` says, when a setting cannot be, the key is gone, or nothing could be written.
    pub fn update(
        &self,
        actor: &Actor,
        id: &KeyId,
        change: impl FnOnce(&mut KeySettings) -> Result<(), BadSetting>,
    ) -> Result<Arc<Key>, ControlError> {
        self.replace(actor, Action::Updated, id, |stored, _| {
            change(&mut stored.key.settings)?;
            Ok(stored.key.settings.check()?)
        })
    }

    /// A blocked key is refused until it is unblocked.
    ///
    /// # Errors
    /// When the key is gone, or nothing could be written.
    pub fn set_blocked(&self, actor: &Actor, id: &KeyId, blocked: bool) -> Result<Arc<Key>, ControlError> {
        let action = if blocked { Action::Blocked } else { Action::Unblocked };
        self.replace(actor, action, id, |stored, _| {
            stored.key.settings.blocked = blocked;
            Ok(())
        })
    }

    /// A new secret for the same key. The one before works on for a `grace`, if one is given; one before that not.
    ///
    /// # Errors
    /// When the key is gone, or nothing could be written.
    pub fn rotate(
        &self,
        actor: &Actor,
        id: &KeyId,
        grace: Option<Span>,
    ) -> Result<(Secret, Arc<Key>), ControlError> {
        let secret = Secret::draw().map_err(ControlError::Random)?;
        let key = self.replace(actor, Action::Rotated, id, |stored, now| {
            stored.old = grace.map(|grace| (stored.hash, grace.after(now)));
            stored.hash = secret.hash();
            stored.key.name = secret.name();
            Ok(())
        })?;
        Ok((secret, key))
    }

    /// Deletes keys for good, all or none. Their rows stay, since their ids stand on receipts.
    ///
    /// # Errors
    /// When one is gone, or nothing could be written.
    pub fn delete(&self, actor: &Actor, ids: &[KeyId]) -> Result<(), ControlError> {
        let at = self.now();
        let deed = Deed { at, actor, action: Action::Deleted };
        let deleted: Vec<StoredKey> = lock(&self.0.writer).transact(|change| {
            let delete = |id| {
                let before = change.living(id)?;
                let mut after = before.clone();
                after.key.updated = at.max(before.key.updated);
                after.key.deleted = Some(after.key.updated);
                change.write(&deed, Some(&before), after)
            };
            ids.iter().map(delete).collect()
        })?;
        deleted.into_iter().for_each(|stored| drop(self.take_up(stored)));
        Ok(())
    }

    fn replace(
        &self,
        actor: &Actor,
        action: Action,
        id: &KeyId,
        change: impl FnOnce(&mut StoredKey, UnixNanos) -> Result<(), ControlError>,
    ) -> Result<Arc<Key>, ControlError> {
        let at = self.now();
        let deed = Deed { at, actor, action };
        let stored = lock(&self.0.writer).transact(|open| {
            let before = open.living(id)?;
            let mut after = before.clone();
            change(&mut after, at)?;
            // The wall clock may have been set back.
            after.key.updated = at.max(before.key.updated);
            open.write(&deed, Some(&before), after)
        })?;
        Ok(self.take_up(stored))
    }

    /// What was just written is in force from here on, without another look at the file.
    fn take_up(&self, stored: StoredKey) -> Arc<Key> {
        let key = Arc::new(stored.key.clone());
        self.0.ring.write().unwrap_or_else(PoisonError::into_inner).put(stored);
        key
    }

    /// The trail, newest first.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn trail(&self, page: &AuditPage) -> Result<Vec<AuditEntry>, ControlError> {
        lock(&self.0.watch).reader.trail(page)
    }
}

/// A thread that panicked while holding one of these left the data whole: the database rolls back, and the ring is
/// changed a key at a time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
