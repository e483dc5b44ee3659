//! Opening the ledger: the data directory's lock, and what a crash left behind.
//!
//! Does: make sure that one server owns the directory; end every epoch that stopped without a word at its
//! checkpoint, with the time since then on `house:crash`; start a new epoch for each device.
//! Does not know: threads, waiters.
//! Invariants: nothing is written before the lock is held and the database is known to be ours; all
//! epochs of a crashed server end in one transaction, once.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use super::books::{Books, Epoch, NextTransaction};
use super::group::Group;
use super::rows::{self, CheckpointRow};
use super::store::{FILE, Store};
use super::{LedgerError, MeteredDevice, OpenOptions};

const LOCK: &str = "ledger.lock";

/// Everything the writer starts with. The directory is ours until `lock` is dropped.
pub(super) struct Opened {
    pub(super) store: Store,
    /// One for each engine.
    pub(super) groups: Vec<Group>,
    pub(super) next_transaction: NextTransaction,
    pub(super) lock: File,
}

pub(super) fn open(data_dir: &Path, options: &OpenOptions) -> Result<Opened, LedgerError> {
    let lock = lock(data_dir)?;
    let path = data_dir.join(FILE);
    let mut store = Store::open(&path)?;
    let broken = |source| LedgerError::unreadable(&path, source);
    end_crashed_epochs(&mut store, options).map_err(broken)?;
    for MeteredDevice { rate, .. } in options.engines.iter().flatten() {
        if let Some(known) = rows::rate(store.connection(), rate.version()).map_err(broken)?
            && known != *rate
        {
            return Err(LedgerError::RateVersion {
                version: known.version().to_owned(),
                known: known.to_string(),
            });
        }
    }
    let mut groups = Vec::with_capacity(options.engines.len());
    for devices in &options.engines {
        let mut books = Vec::with_capacity(devices.len());
        for MeteredDevice { info, rate } in devices {
            let id = store.open_epoch(&options.boot_id, info, rate, options.wall).map_err(broken)?;
            let epoch = Epoch { id, device: info.id.clone(), rate: rate.clone() };
            books.push(Books::open(epoch, options.wall));
        }
        groups.push(Group::new(books));
    }
    let next_transaction = store.next_transaction().map_err(broken)?;
    Ok(Opened { store, groups, next_transaction, lock })
}

/// Brings the ledger of an earlier build to this build's schema, while no server has it.
pub(super) fn upgrade(data_dir: &Path) -> Result<(), LedgerError> {
    let _ours = lock(data_dir)?;
    Store::open(&data_dir.join(FILE)).map(drop)
}

/// Takes the directory for this process. The kernel lets it go when the process ends, however it ends.
fn lock(data_dir: &Path) -> Result<File, LedgerError> {
    let failed = |source| LedgerError::DataDir { path: data_dir.to_owned(), source };
    std::fs::create_dir_all(data_dir).map_err(failed)?;
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(data_dir.join(LOCK))
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder).map_err(failed)?;
            let holder = if holder.trim().is_empty() { "another process" } else { holder.trim() };
            return Err(LedgerError::InUse { path: data_dir.to_owned(), holder: holder.to_owned() });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    let name = format!("process {}\n", std::process::id());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(name.as_bytes()))
        .map_err(failed)?;
    Ok(file)
}

/// Those of one start end together: a request may have used several devices.
fn end_crashed_epochs(store: &mut Store, options: &OpenOptions) -> Result<(), rusqlite::Error> {
    let mut boots: Vec<(String, Vec<(Books, CheckpointRow)>)> = Vec::new();
    for row in rows::epochs(store.connection())?.into_iter().filter(|row| row.end.is_none()) {
        let id = row.epoch.id;
        let Some(checkpoint) = rows::checkpoint(store.connection(), &row)? else {
            // Epoch and first checkpoint are one transaction: somebody else has written here. The audit
            // names it; no time can be booked from nothing.
            tracing::error!(epoch = id, "epoch has neither an end nor a checkpoint; run `obol audit`");
            continue;
        };
        let books = checkpoint.books(row.epoch, rows::posted(store.connection(), id)?);
        match boots.iter_mut().find(|(boot, _)| *boot == row.boot) {
            Some((_, epochs)) => epochs.push((books, checkpoint)),
            None => boots.push((row.boot, vec![(books, checkpoint)])),
        }
    }
    for (_, epochs) in boots {
        let (books, checkpoints): (Vec<Books>, Vec<CheckpointRow>) = epochs.into_iter().unzip();
        let mut group = Group::new(books);
        let mut next = store.next_transaction()?;
        let records = group.crash(options.wall, &mut next, |usage| {
            let mut open = checkpoints.iter().flat_map(|checkpoint| &checkpoint.open);
            open.find(|open| open.accrual.ticket == usage.ticket)
                .and_then(|open| open.attribution.clone())
                .map(Into::into)
        });
        for (books, checkpoint) in group.books.iter().zip(&checkpoints) {
            tracing::warn!(
                epoch = books.epoch.id,
                device = books.epoch.device,
                unsettled = checkpoint.open.len(),
                down_seconds = (books.last.now - checkpoint.snapshot.now).as_secs_f64(),
                "the last server stopped without closing its books: closed at its checkpoint"
            );
        }
        store.commit(&records, &[], &[], &mut |_| None)?;
    }
    Ok(())
}
