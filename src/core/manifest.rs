//! Placeholder: the real one is written elsewhere; only the signatures count here.
#![allow(dead_code, unused)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    Term,
    Kill,
}
