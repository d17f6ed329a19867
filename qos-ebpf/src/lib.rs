//! Empty on purpose: a library target lets `qos-userspace` name this crate as a build
//! dependency, so that cargo rebuilds the object when the programs change.
#![no_std]
