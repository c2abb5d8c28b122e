//! The screens of `nvshare top`, without a terminal.
//!
//! ```text
//!   keys, readings of the node ──▶ Model::update ──▶ what is to be done (quit, change a weight)
//!                                       │
//!                                       ▼
//!                                  view::screen ──▶ lines of text with styles ──▶ a terminal, a file, a picture
//! ```
//!
//! [`model`] holds what the monitor knows and what a key changes; [`view`] makes lines of it, which depend on nothing else but the
//! width and the height. Neither asks a clock, a file or a terminal, so tests and pictures need none. The loop that has them is in
//! `nvshare-tools`.
//!
//! | module | what it holds |
//! |---|---|
//! | [`model`] | the state, and how events change it |
//! | [`rates`] | what happens a second, from two readings |
//! | [`order`] | which clients are shown, in which order |
//! | [`view`] | the screens |
//! | [`picture`] | a screen as SVG |

pub mod model;
pub mod order;
pub mod picture;
pub mod rates;
pub mod view;

pub use model::{Event, Key, Model, Request, Settings};
