//! Request bodies: whole, within a size and a time, or an error that says which.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use super::HttpConfig;
use super::error::ApiError;

/// What is still read, and thrown away, of a body that was refused, so that the client gets to read why:
/// a connection closed on unread bytes is reset, and with it goes the answer.
const LINGER_BYTES_MAX: usize = 64 << 20;
const LINGER_TIME_MAX: Duration = Duration::from_secs(10);

pub(super) async fn read(
    config: &HttpConfig,
    headers: &HeaderMap,
    mut body: Body,
) -> Result<Bytes, ApiError> {
    let bytes_max = config.body_bytes_max;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|bytes: u64| bytes > bytes_max as u64) {
        tokio::spawn(linger(body));
        return Err(ApiError::BodyTooLarge { bytes_max });
    }
    match tokio::time::timeout(config.body_time_max, collect(&mut body, bytes_max)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error @ ApiError::BodyTooLarge { .. })) => {
            tokio::spawn(linger(body));
            Err(error)
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(ApiError::BodyTooSlow { seconds_max: config.body_time_max.as_secs() }),
    }
}

async fn collect(body: &mut Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| ApiError::BodyUnreadable)?.into_data() else { continue };
        if whole.len() + data.len() > bytes_max {
            return Err(ApiError::BodyTooLarge { bytes_max });
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

/// Reads on, within bounds, what nobody wants.
pub(super) async fn linger(mut body: Body) {
    let rest = async {
        let mut bytes = 0;
        while let Some(Ok(frame)) = body.frame().await {
            bytes += frame.data_ref().map_or(0, Bytes::len);
            if bytes > LINGER_BYTES_MAX {
                break;
            }
        }
    };
    // Past either bound the connection is closed, read or not.
    let _over = tokio::time::timeout(LINGER_TIME_MAX, rest).await;
}
