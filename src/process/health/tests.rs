//! Questions to servers and programs that answer as told.
