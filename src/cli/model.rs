//! From a model argument to a path on disk: catalog names and ids of the hub are fetched, paths are taken as they are.

use std::path::PathBuf;
use std::process::ExitCode;

use obol_models::catalog::{Catalog, Entry, HubId, Resolved};
use obol_models::fetch::{Asking, Checksum, FetchOptions, Fetched, fetch_entry, fetch_repository, progress};
use serde_json::json;

use super::{Directories, Failure, print};

/// The id that clients use, and where the model is.
pub(super) struct Located {
    pub(super) id: String,
    /// What it was asked for by, if that is another name than the id and none of this machine's paths.
    pub(super) alias: Option<String>,
    /// A GGUF file, or a directory with a `config.json`.
    pub(super) file: PathBuf,
}

/// Finds the model, fetching what the cache does not have. `revision` is of a repository of the hub; nothing else
/// has one.
pub(super) fn locate(
    argument: &str,
    revision: Option<&str>,
    directories: &Directories,
) -> Result<Located, Failure> {
    if let Ok(Resolved::Entry(entry)) = Catalog::builtin().resolve(argument)
        && entry.embeds
    {
        return Err(Failure::usage(format!(
            "'{argument}' makes embeddings and generates nothing; serve it beside a model with --embedding-model"
        )));
    }
    Ok(find(argument, revision, Asking::IfNeeded, directories)?.located)
}

/// As [`locate`], of a model that makes embeddings.
pub(super) fn locate_encoder(argument: &str, directories: &Directories) -> Result<Located, Failure> {
    Ok(find(argument, None, Asking::IfNeeded, directories)?.located)
}

pub(super) fn pull(
    name: Option<&str>,
    revision: Option<&str>,
    json: bool,
    directories: &Directories,
) -> Result<ExitCode, Failure> {
    let catalog = Catalog::builtin();
    let name = name.unwrap_or(&catalog.default_entry().name);
    let found = find(name, revision, Asking::Always, directories)?;
    print(&match json {
        true => found.json().to_string(),
        false => found.located.file.display().to_string(),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A model, and what is known of it beyond its path.
struct Found {
    located: Located,
    /// Revision and commit, of the hub's models.
    version: Option<(String, String)>,
    files: Vec<(String, u64, Option<Checksum>)>,
}

impl Found {
    fn json(&self) -> serde_json::Value {
        let file = |(path, size, checksum): &(String, u64, Option<Checksum>)| {
            let mut file = json!({ "path": path, "size": size });
            match checksum {
                Some(Checksum::Sha256(value)) => file["sha256"] = json!(value),
                Some(Checksum::GitSha1(value)) => file["git_sha1"] = json!(value),
                None => {}
            }
            file
        };
        let version = self.version.as_ref();
        json!({
            "model": self.located.id,
            "path": self.located.file,
            "revision": version.map(|(revision, _)| revision),
            "commit": version.map(|(_, commit)| commit),
            "files": self.files.iter().map(file).collect::<Vec<_>>(),
        })
    }
}

fn find(
    argument: &str,
    revision: Option<&str>,
    asking: Asking,
    directories: &Directories,
) -> Result<Found, Failure> {
    let catalog = Catalog::builtin();
    let resolved = catalog.resolve(argument).map_err(Failure::usage)?;
    if revision.is_some() && !matches!(resolved, Resolved::Hub(_)) {
        return Err(Failure::usage(format!(
            "--revision: '{argument}' is a name of the catalog or a path, and has no revisions"
        )));
    }
    let bar = progress::Stderr::new();
    let options = FetchOptions { hub_token: directories.hub_token.clone(), ..FetchOptions::default() };
    match resolved {
        Resolved::Path(path) => Ok(own(argument, path)),
        Resolved::Entry(entry) => {
            let file = fetch_entry(entry, &directories.models, &options, &bar).map_err(Failure::failed)?;
            let described = |part: Entry| (part.file, part.bytes, Some(Checksum::Sha256(part.sha256)));
            Ok(Found {
                located: Located { id: entry.name.clone(), alias: None, file },
                version: None,
                files: entry.parts().into_iter().map(described).collect(),
            })
        }
        Resolved::Hub(id) => {
            let fetched = fetch_repository(&id, revision, &directories.models, asking, &options, &bar);
            let Fetched { path, revision, commit, files } = fetched.map_err(Failure::failed)?;
            Ok(Found {
                located: of_hub(argument, &id, path),
                version: Some((revision, commit)),
                files: files.into_iter().map(|file| (file.path, file.size, Some(file.checksum))).collect(),
            })
        }
    }
}

/// A model of the hub, which goes by its repository, and by the file too if one was named.
fn of_hub(argument: &str, id: &HubId, file: PathBuf) -> Located {
    let repository = id.repository();
    let alias = (argument != repository).then(|| argument.to_owned());
    Located { id: repository, alias, file }
}

/// A model of the user's own, which goes by the name of its file or directory.
fn own(argument: &str, path: PathBuf) -> Found {
    let whole = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
    let name = if path.is_dir() { whole.file_name() } else { whole.file_stem() };
    let id = name.map_or_else(|| argument.to_owned(), |name| name.to_string_lossy().into_owned());
    let within = std::fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = if path.is_dir() { within.collect() } else { vec![whole] };
    files.sort();
    let described = |file: PathBuf| {
        let length = file.metadata().ok().filter(|metadata| metadata.is_file())?.len();
        Some((file.file_name()?.to_string_lossy().into_owned(), length, None))
    };
    let files = files.into_iter().filter_map(described).collect();
    Found { located: Located { id, alias: None, file: path }, version: None, files }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_of_the_hub_goes_by_its_repository_and_by_the_named_file() {
        for (argument, alias) in
            [("someone/x", None), ("someone/x:a/b.gguf", Some("someone/x:a/b.gguf".to_owned()))]
        {
            let id = HubId::parse(argument).expect("an id").expect("a good id");
            let located = of_hub(argument, &id, PathBuf::from("file"));
            assert_eq!((located.id.as_str(), located.alias), ("someone/x", alias));
        }
    }
}
