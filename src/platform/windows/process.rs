//! Windows side of it.
