//! The control pages on the arbiter's side: made, taken over with their clients from an arbiter before, kept right.
//!
//! - `served`: a page that is served, and what the arbiter alone writes there.
//! - `open`: makes a page, or takes it over; why that can fail.
//! - `takeover`: which clients of a page live, and closes the books of the others.
//! - `page_from_client`: waits for a client to bring a page that the arbiter cannot reach itself.

mod open;
mod page_from_client;
mod served;
mod takeover;

pub use open::{PageError, Succession, open};
pub use page_from_client::Listen;
pub use served::ServedPage;
pub use takeover::Survivor;
