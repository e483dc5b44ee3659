//! PTX modules: the text of one is read once for its variables and the heads of its functions; the
//! body of an entry is decoded when it is first launched.

mod declaration;
mod module;
mod statement;
mod text;
mod types;

pub use module::{Function, Module, Param, ParseError};
pub(crate) use module::{Scope, Side};
pub(crate) use statement::{Item, Statement, items};
pub(crate) use text::{float, integer, split};
pub(crate) use types::Type;
