//! `/v1/files`: what batches read and write. A file is its maker's; to others it does not exist.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Path, RawQuery, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use axum::{Extension, Json};
use bytes::{Bytes, BytesMut};
use futures::stream;
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::fields::Invalid;
use super::receipts::{decoded, number};
use super::{Server, body};
use crate::batches::{Batches, BatchesError, FileFacts, Page, Purpose, Sort, Upload};

const PAGE_MAX: u64 = 10_000;
const FILENAME_CHARS_MAX: usize = 255;
/// A form's fields beside the file, and what is around them.
const FORM_BYTES: u64 = 64 << 10;
/// Bytes that are written, or read, at a time.
const PART_BYTES: usize = 1 << 20;
/// What is left of a form that was refused is read for so long, so that its client gets to read why.
const LINGER: Duration = Duration::from_secs(10);

/// Work on files and batches, on a thread that may wait for the disk.
pub(super) async fn on_disk<T: Send + 'static>(
    batches: &Batches,
    work: impl FnOnce(&Batches) -> Result<T, BatchesError> + Send + 'static,
) -> Result<T, ApiError> {
    let batches = batches.clone();
    match tokio::task::spawn_blocking(move || work(&batches)).await {
        Ok(done) => Ok(done?),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that is being shut down cancels blocking work.
        Err(_) => Err(ApiError::Loading),
    }
}

pub(super) async fn upload(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let batches = server.batches()?;
    let bytes_max = batches.limits().file_bytes;
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|bytes: u64| bytes > bytes_max + FORM_BYTES) {
        tokio::spawn(body::linger(request.into_body()));
        return Err(BatchesError::TooLarge { bytes_max }.into());
    }
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|_| {
        Invalid::body("the body must be a form (multipart/form-data) with the fields `purpose` and `file`")
    })?;
    let patience = server.config.body_time_max;
    match read(batches, &mut form, patience).await {
        Ok((upload, filename)) => {
            let owner = caller.maker();
            let kept = on_disk(batches, move |batches| batches.keep(upload, &owner, &filename)).await?;
            Ok(Json(shape(&kept)))
        }
        Err(error) => {
            // Past this the connection is closed, read or not.
            let _over =
                tokio::time::timeout(LINGER, async { while let Ok(Some(_)) = form.next_field().await {} })
                    .await;
            Err(error)
        }
    }
}

/// The form's file, and what it is called.
async fn read(
    batches: &Batches,
    form: &mut Multipart,
    patience: Duration,
) -> Result<(Upload, String), ApiError> {
    let (mut file, mut purpose) = (None, None);
    while let Some(mut field) = in_time(patience, form.next_field()).await? {
        let name = field.name().unwrap_or_default().to_owned();
        match name.as_str() {
            "purpose" => purpose = Some(short(&mut field, patience).await?),
            "file" if file.is_none() => {
                let given = field.file_name().unwrap_or_default();
                let filename: String =
                    given.chars().filter(|c| !c.is_control()).take(FILENAME_CHARS_MAX).collect();
                let filename = if filename.is_empty() { "upload.jsonl".to_owned() } else { filename };
                file = Some((written(batches, &mut field, patience).await?, filename));
            }
            "file" => return Err(Invalid::new("file", "`file` is there twice").into()),
            _ => {
                let message = format!(
                    "unknown field `{name}`: a file has `purpose` and `file`, and is kept until it is deleted"
                );
                return Err(Invalid::new(name, message).into());
            }
        }
    }
    match purpose.as_deref() {
        Some("batch") => {}
        Some(other) => {
            let message =
                format!("`purpose` = {other:?} is not supported: files here are for batches, \"batch\"");
            return Err(Invalid::new("purpose", message).into());
        }
        None => return Err(Invalid::new("purpose", "`purpose` is required: \"batch\"").into()),
    }
    file.ok_or_else(|| Invalid::new("file", "`file` is required: the bytes of the file").into())
}

async fn in_time<T>(
    patience: Duration,
    read: impl Future<Output = Result<T, MultipartError>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(patience, read).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(_)) => Err(ApiError::BodyUnreadable),
        Err(_) => Err(ApiError::BodyTooSlow { seconds_max: patience.as_secs() }),
    }
}

async fn short(field: &mut Field<'_>, patience: Duration) -> Result<String, ApiError> {
    let mut text = Vec::new();
    while let Some(chunk) = in_time(patience, field.chunk()).await? {
        text.extend_from_slice(&chunk);
        if text.len() > 256 {
            return Err(Invalid::new("purpose", "`purpose` is too long").into());
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Writes the field to the disk as it comes.
async fn written(batches: &Batches, field: &mut Field<'_>, patience: Duration) -> Result<Upload, ApiError> {
    let mut upload = on_disk(batches, Batches::upload).await?;
    let mut part = BytesMut::new();
    loop {
        let chunk = in_time(patience, field.chunk()).await?;
        part.extend_from_slice(chunk.as_deref().unwrap_or_default());
        if part.len() >= PART_BYTES || chunk.is_none() {
            let bytes = std::mem::take(&mut part).freeze();
            upload = on_disk(batches, move |_| upload.write(&bytes).map(|()| upload)).await?;
        }
        if chunk.is_none() {
            return Ok(upload);
        }
    }
}

pub(super) async fn list(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let batches = server.batches()?;
    let mut page = Page { limit: PAGE_MAX as usize, after: None, sort: Sort::NewestFirst };
    let mut purpose = None;
    for (name, value) in pairs(query.as_deref().unwrap_or_default())? {
        match name.as_str() {
            "limit" => page.limit = number(&name, &value, 1..=PAGE_MAX)? as usize,
            "after" => page.after = Some(value),
            "order" if value == "asc" => page.sort = Sort::OldestFirst,
            "order" if value == "desc" => page.sort = Sort::NewestFirst,
            "order" => return Err(Invalid::new("order", "`order` must be asc or desc").into()),
            "purpose" => match Purpose::parse(&value) {
                Some(found) => purpose = Some(found),
                None => return Err(Invalid::new("purpose", "`purpose` must be batch or batch_output").into()),
            },
            _ => return Err(Invalid::new(&name, format!("unknown query parameter `{name}`")).into()),
        }
    }
    let owner = caller.key().is_some().then(|| caller.maker());
    let (files, more) =
        on_disk(batches, move |batches| batches.files(owner.as_ref(), purpose, &page)).await?;
    Ok(Json(json!({
        "object": "list",
        "data": files.iter().map(shape).collect::<Vec<_>>(),
        "first_id": files.first().map(|file| &file.id),
        "last_id": files.last().map(|file| &file.id),
        "has_more": more,
    })))
}

/// The query's names and values.
pub(super) fn pairs(query: &str) -> Result<Vec<(String, String)>, Invalid> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value)
                .ok_or_else(|| Invalid::new(name, format!("`{name}` is not percent-encoded UTF-8")))?;
            Ok((name.to_owned(), value))
        })
        .collect()
}

/// A file that the caller may see.
pub(super) async fn found(batches: &Batches, caller: &Caller, id: &str) -> Result<FileFacts, ApiError> {
    let wanted = id.to_owned();
    let file = on_disk(batches, move |batches| batches.file(&wanted)).await?;
    let file = file.filter(|file| caller.may_read(file.owner.key_id.as_deref()));
    file.ok_or_else(|| ApiError::FileNotFound { id: id.to_owned() })
}

pub(super) async fn one(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    found(server.batches()?, &caller, &id).await.map(|file| Json(shape(&file)))
}

pub(super) async fn delete(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let batches = server.batches()?;
    let file = found(batches, &caller, &id).await?;
    let deleted = on_disk(batches, move |batches| batches.delete_file(&file.id)).await;
    match deleted {
        // Somebody else was faster.
        Err(ApiError::Batches(BatchesError::NoSuchFile { id })) => Err(ApiError::FileNotFound { id }),
        deleted => deleted.map(|()| Json(json!({"id": id, "object": "file", "deleted": true}))),
    }
}

pub(super) async fn content(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let batches = server.batches()?;
    let file = found(batches, &caller, &id).await?;
    let path = batches.path(&file);
    let opened = on_disk(batches, move |_| {
        File::open(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => BatchesError::NoSuchFile { id },
            _ => BatchesError::Disk { path, source },
        })
    })
    .await?;
    let parts = stream::unfold(Some(opened), |file| async move {
        match next_part(file?).await {
            Ok((_, part)) if part.is_empty() => None,
            Ok((file, part)) => Some((Ok(part), Some(file))),
            Err(error) => Some((Err(error), None)),
        }
    });
    let mut response = Response::new(Body::from_stream(parts));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes));
    let plain = |c: char| if c.is_ascii_graphic() && c != '"' && c != '\\' { c } else { '_' };
    let named = format!("attachment; filename=\"{}\"", file.filename.chars().map(plain).collect::<String>());
    let named = HeaderValue::try_from(named).expect("printable ASCII is a header's value");
    headers.insert(header::CONTENT_DISPOSITION, named);
    Ok(response)
}

async fn next_part(mut file: File) -> std::io::Result<(File, Bytes)> {
    let read = tokio::task::spawn_blocking(move || {
        let mut part = Vec::with_capacity(PART_BYTES);
        Read::by_ref(&mut file).take(PART_BYTES as u64).read_to_end(&mut part)?;
        Ok((file, Bytes::from(part)))
    });
    read.await.map_err(std::io::Error::other)?
}

fn shape(file: &FileFacts) -> Value {
    json!({
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created,
        "expires_at": null,
        "filename": file.filename,
        "purpose": file.purpose.as_str(),
        "status": "processed",
        "status_details": null,
    })
}
