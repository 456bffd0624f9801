//! Checkpoints opened, and refused.
