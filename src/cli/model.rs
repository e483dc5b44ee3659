//! From a model argument to a file on disk: catalog names are fetched, paths are taken as they are.

use std::path::PathBuf;
use std::process::ExitCode;

use obol_models::catalog::{Catalog, Resolved};
use obol_models::fetch::{self, progress};

use super::{Directories, Failure, print};

/// The id that clients use, and the file.
pub(super) struct Located {
    pub(super) id: String,
    pub(super) file: PathBuf,
}

/// Finds the model, fetching it if the catalog has it and the cache does not. `revision` is of a
/// repository of the hub; nothing else has one.
pub(super) fn locate(
    argument: &str,
    revision: Option<&str>,
    directories: &Directories,
) -> Result<Located, Failure> {
    let catalog = Catalog::builtin();
    if revision.is_some() {
        return Err(Failure::usage(format!(
            "--revision: '{argument}' is a name of the catalog or a file, and has no revisions"
        )));
    }
    match catalog.resolve(argument).map_err(Failure::usage)? {
        Resolved::File(file) => {
            let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            Ok(Located { id: stem.unwrap_or_else(|| argument.into()), file })
        }
        Resolved::Entry(entry) => {
            let bar = progress::Stderr::new();
            let file = fetch::fetch(entry, &directories.models, &bar).map_err(Failure::failed)?;
            Ok(Located { id: entry.name.clone(), file })
        }
    }
}

pub(super) fn pull(
    name: Option<&str>,
    revision: Option<&str>,
    json: bool,
    directories: &Directories,
) -> Result<ExitCode, Failure> {
    let catalog = Catalog::builtin();
    let located = locate(name.unwrap_or(&catalog.default_entry().name), revision, directories)?;
    print(&match json {
        true => serde_json::json!({ "model": located.id, "file": located.file }).to_string(),
        false => located.file.display().to_string(),
    })?;
    Ok(ExitCode::SUCCESS)
}
