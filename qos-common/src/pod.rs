//! Conversion of map values to bytes and back.

use aya::Pod;

use crate::abi::{
    Allocation, Answer, Application, Clocks, Counters, Fragment, FragmentKey, Interface, Line, LineClasses,
    LineKey, Outcomes, Provider, Question, Settings,
};
use crate::classify::{Rule, Slot, TableSet};

macro_rules! pod {
    ($($name:ty),+ $(,)?) => {$(
        // SAFETY: `repr(C)`, made of integers and arrays of them, padding named, any bytes valid.
        unsafe impl Pod for $name {}
    )+};
}

pod!(
    Allocation,
    Answer,
    Application,
    Clocks,
    Counters,
    Fragment,
    FragmentKey,
    Slot,
    Interface,
    Line,
    LineClasses,
    LineKey,
    Outcomes,
    Provider,
    Question,
    Rule,
    Settings,
    TableSet,
);
