//! Without sockets: what can't be brought about from outside.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
