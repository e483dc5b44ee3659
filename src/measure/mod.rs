//! What `obol compare` and `obol bench` share: requests through the engine that the server uses, closed
//! loops, statistics, tables, pictures, progress. Knows no variant, no server and no price.

pub mod asking;
pub mod picture;
pub mod progress;
pub mod statistics;
pub mod table;
