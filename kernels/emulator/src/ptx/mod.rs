//! PTX modules: the text of one is read once for its variables and the heads of its functions; the
//! body of an entry is decoded when it is first launched.

mod declaration;
mod module;
mod text;

pub use module::{Function, Module, Param, ParseError};
