//! The gateway as the operator and the hosts meet it.
