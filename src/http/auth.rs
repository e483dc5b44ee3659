//! Who asks: the administrator, a key, or anybody where the server is open.
//!
//! Without an admin key the server is open: any bearer is taken, and one that is a key of ours is held to it. With
//! one, every call but the probes needs a key. Knows no endpoint but those; what a caller may do there is theirs.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;

use super::error::ApiError;
use super::spend_query::Viewer;
use super::{Server, body};
use crate::batches::Owner;
use crate::control::{Actor, ConfiguredKey, Control, Denied, Key, SECRET_PREFIX};
use crate::pipeline::BatchLine;
use crate::request::Tag;

/// Tenants that no key makes.
const ANONYMOUS: &str = "anonymous";
const ADMIN: &str = "admin";

/// Who may read `/metrics`.
#[derive(Debug, Clone, Default)]
pub enum MetricsAccess {
    /// Anybody who reaches the server.
    #[default]
    Everybody,
    /// Who has this key, or the admin key.
    Keyed(Option<ConfiguredKey>),
}

/// Who may do what; fixed at the start, but for the keys themselves.
#[derive(Clone, Default)]
pub struct Access {
    /// `None`: there are no keys.
    pub control: Option<Control>,
    /// `None`: the server is open.
    pub admin: Option<ConfiguredKey>,
    pub metrics: MetricsAccess,
    /// Tags without which a request is refused.
    pub require_tags: Arc<[Tag]>,
    /// The tenants that may ask for the tier `priority`; `None`: all.
    pub priority: Option<Arc<[String]>>,
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) enum Caller {
    /// Somebody without a key, where none is needed.
    Anybody,
    Key(Arc<Key>),
    Admin(Actor),
    /// A batch, for whoever made it.
    Batch(Arc<Behalf>),
}

/// For whom a line of a batch is run. Only this server can put it on a request.
#[derive(Debug, Clone)]
pub(crate) struct Behalf {
    pub(crate) key: Option<Arc<Key>>,
    pub(crate) tenant: String,
    pub(crate) line: Arc<BatchLine>,
}

impl Caller {
    pub(crate) fn key(&self) -> Option<&Arc<Key>> {
        match self {
            Self::Key(key) => Some(key),
            Self::Batch(behalf) => behalf.key.as_ref(),
            Self::Anybody | Self::Admin(_) => None,
        }
    }

    /// Whose prefix cache and books it is.
    pub(crate) fn tenant(&self) -> &str {
        match self {
            Self::Anybody => ANONYMOUS,
            Self::Key(key) => key.tenant(),
            Self::Admin(_) => ADMIN,
            Self::Batch(behalf) => &behalf.tenant,
        }
    }

    /// Whose what it has kept is: nobody else's, not even the administrator's.
    pub(crate) fn owner(&self) -> String {
        match self {
            Self::Anybody => ANONYMOUS.to_owned(),
            Self::Key(key) => format!("key:{}", key.id.0),
            Self::Admin(_) => ADMIN.to_owned(),
            // As whoever made the batch would have by themselves.
            Self::Batch(behalf) => match &behalf.key {
                Some(key) => format!("key:{}", key.id.0),
                None => behalf.tenant.clone(),
            },
        }
    }

    /// The attempt at a line that the request is, if it is one.
    pub(crate) fn batch(&self) -> Option<&Arc<BatchLine>> {
        match self {
            Self::Batch(behalf) => Some(&behalf.line),
            Self::Anybody | Self::Key(_) | Self::Admin(_) => None,
        }
    }

    /// Whose the files and batches are that it makes.
    pub(crate) fn maker(&self) -> Owner {
        Owner { key_id: self.key().map(|key| key.id.0.clone()) }
    }

    /// What it sees of what was spent.
    fn viewer(&self) -> Viewer {
        match self {
            Self::Anybody | Self::Admin(_) => Viewer::Admin,
            Self::Key(_) | Self::Batch(_) => Viewer::Key(self.maker().key_id.unwrap_or_default()),
        }
    }

    /// Whether receipts of this key may be read.
    pub(crate) fn may_read(&self, key_id: Option<&str>) -> bool {
        match self {
            Self::Anybody | Self::Admin(_) => true,
            Self::Key(key) => key_id == Some(&key.id.0),
            Self::Batch(_) => false,
        }
    }
}

impl Access {
    /// The administrator, if it is one.
    ///
    /// # Errors
    /// Says whether there could be one.
    pub(super) fn administrator(&self, caller: Caller) -> Result<(Control, Actor), ApiError> {
        match (caller, &self.control) {
            (Caller::Admin(actor), Some(control)) => Ok((control.clone(), actor)),
            _ if self.admin.is_none() => Err(ApiError::NoAdminKey),
            _ => Err(ApiError::AdminOnly),
        }
    }

    fn admit(&self, path: &str, headers: &HeaderMap) -> Result<Caller, ApiError> {
        match path {
            "/health" | "/ready" | "/docs" | "/openapi.json" => Ok(Caller::Anybody),
            "/metrics" => self.admit_scrape(headers),
            _ => self.admit_call(presented(headers)),
        }
    }

    fn admit_call(&self, secret: Option<&str>) -> Result<Caller, ApiError> {
        let find = |secret: &str| match &self.control {
            Some(control) => control.find(secret).map(Caller::Key),
            None => Err(Denied::Unknown),
        };
        match (&self.admin, secret) {
            (Some(_), None) => Err(ApiError::KeyMissing),
            (Some(admin), Some(secret)) if admin.matches(secret) => Ok(Caller::Admin(Actor::admin(admin))),
            (Some(_), Some(secret)) => Ok(find(secret)?),
            (None, Some(secret)) if secret.starts_with(SECRET_PREFIX) => match find(secret) {
                Err(Denied::Unknown) => Ok(Caller::Anybody),
                found => Ok(found?),
            },
            (None, _) => Ok(Caller::Anybody),
        }
    }

    fn admit_scrape(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let MetricsAccess::Keyed(own) = &self.metrics else { return Ok(Caller::Anybody) };
        let keys: Vec<&ConfiguredKey> = [own.as_ref(), self.admin.as_ref()].into_iter().flatten().collect();
        match presented(headers) {
            _ if keys.is_empty() => Ok(Caller::Anybody),
            None => Err(ApiError::KeyMissing),
            Some(secret) if keys.iter().any(|key| key.matches(secret)) => Ok(Caller::Anybody),
            Some(_) => Err(Denied::Unknown.into()),
        }
    }
}

/// The secret that a request carries: OpenAI's way, or Anthropic's.
fn presented(headers: &HeaderMap) -> Option<&str> {
    let authorization = headers.get(header::AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
    let bearer = authorization.map(|value| match value.split_once(' ') {
        Some((scheme, secret)) if scheme.eq_ignore_ascii_case("bearer") => secret.trim(),
        _ => "",
    });
    let other = || headers.get("x-api-key").map(|value| value.to_str().unwrap_or_default());
    bearer.or_else(other).filter(|secret| !secret.is_empty())
}

pub(super) async fn authenticate(
    State(server): State<Arc<Server>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    // A line's key was looked at before the line was run; nothing that comes over the network has this.
    let behalf = request.extensions_mut().remove::<Arc<Behalf>>();
    let admitted = match behalf {
        Some(behalf) => Ok(Caller::Batch(behalf)),
        None => server.access.admit(request.uri().path(), request.headers()),
    };
    match admitted {
        Ok(caller) => {
            request.extensions_mut().insert(caller.viewer());
            request.extensions_mut().insert(caller);
            Ok(next.run(request).await)
        }
        Err(error) => {
            tokio::spawn(body::linger(request.into_body()));
            Err(error)
        }
    }
}

/// A path for the log: parts that look like keys are cut.
pub(super) fn without_secrets(path: &str) -> String {
    let parts = path.split('/').map(|part| if part.starts_with("sk-") { "sk-..." } else { part });
    parts.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn secrets_are_found_in_either_header() {
        let given = |pairs: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, HeaderValue::from_static(value));
            }
            presented(&headers).map(str::to_owned)
        };
        assert_eq!(given(&[("authorization", "Bearer abc")]).as_deref(), Some("abc"));
        assert_eq!(given(&[("authorization", "bearer  abc ")]).as_deref(), Some("abc"));
        assert_eq!(given(&[("x-api-key", "abc")]).as_deref(), Some("abc"));
        assert_eq!(given(&[("authorization", "Bearer abc"), ("x-api-key", "def")]).as_deref(), Some("abc"));
        for nothing in [
            &[][..],
            &[("authorization", "Basic abc")],
            &[("authorization", "Bearer ")],
            &[("x-api-key", "")],
        ] {
            assert_eq!(given(nothing), None, "{nothing:?}");
        }
    }

    #[test]
    fn a_path_is_logged_without_its_key() {
        assert_eq!(without_secrets("/key/sk-obol-abc/regenerate"), "/key/sk-.../regenerate");
        assert_eq!(without_secrets("/v1/models"), "/v1/models");
    }
}
