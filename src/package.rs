//! Packages: made, signed, and (elsewhere here) fetched, verified and unpacked.

#[cfg(feature = "gateway")]
pub mod pack;
#[cfg(feature = "gateway")]
pub mod sign;
