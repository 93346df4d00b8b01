//! What the invariant tests share: a rig between switcher and model, a reference PMU written apart from the model,
//! and a world of guests and host taking turns on one core.
#![allow(dead_code, clippy::pedantic, clippy::manual_is_multiple_of)]

pub(crate) mod reference;
pub(crate) mod rig;
pub(crate) mod world;
