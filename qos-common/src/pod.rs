//! Conversion of map values to bytes and back.

use aya::Pod;

use crate::abi::{
    Allocation, Answer, Application, Clocks, Counters, Fragment, FragmentKey, Interface, Line, LineClasses,
    LineKey, Outcomes, Provider, Question, Settings,
};
use crate::classify::{Slot, TableSet};
use crate::compact::{Extra, Granule};

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
    Extra,
    Fragment,
    FragmentKey,
    Granule,
    Slot,
    Interface,
    Line,
    LineClasses,
    LineKey,
    Outcomes,
    Provider,
    Question,
    Settings,
    TableSet,
);
