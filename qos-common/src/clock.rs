//! Virtual clocks: the generic cell rate algorithm (ITU-T I.371, "virtual scheduling") in fixed
//! point.
//!
//! A clock is one `u64` that says until when the traffic charged so far has used up the rate. Time
//! is counted in ticks of 2⁻²⁰ ns, so that a byte at 400 Gbit/s is 20,971.52 ticks and rounding
//! costs 0.003 % at most; the counter wraps every 4.9 hours, and every comparison wraps with it.
//! Zero is no time but a clock that is not in use: a real time would lie ahead for a while before each wrap.
//! A clock that was used and then left alone comes to look so too, after some 3.7 hours; whoever keeps clocks
//! sets those that are [`is_long_idle`] to zero before that.

/// Ticks of a clock in one nanosecond, as a power of two.
pub const TICK_BITS: u32 = 20;

/// Lowest rate a meter holds, in bit/s.
pub const MIN_RATE: u64 = 1_000;

/// Highest rate a meter holds, in bit/s.
pub const MAX_RATE: u64 = 400_000_000_000;

/// Largest charge made at once, in bytes: a GSO super-packet of an IPv4 or classic IPv6 stack.
pub const MAX_CHARGE: u64 = 65_536;

/// Longest time a clock may run ahead, in ticks: a quarter of its range, some 73 minutes.
const MAX_WINDOW: u64 = 1 << 62;

/// Longest time between the reading of the time and that of a clock for which a packet is judged as if there were
/// none, in ticks: a minute. A CPU may stand still there, as one of a virtual machine does now and then, while others
/// move the clock on; it then seems to be further ahead than it can be.
const LONGEST_STALL: u64 = ticks(60_000_000_000);

/// A clock that is not in use: it was never used, or not for long. It is idle at any time.
pub const UNUSED: u64 = 0;

/// How far a clock is behind now that is long idle, in ticks: an hour. Such clocks are looked for at least
/// every other hour.
const LONG_IDLE: u64 = ticks(3_600_000_000_000);

// A clock is found before it comes to look as if it were ahead.
const _: () = assert!(LONG_IDLE + ticks(2 * 3_600_000_000_000) < (MAX_WINDOW + LONGEST_STALL).wrapping_neg());

/// Nanoseconds since boot, in ticks.
#[inline(always)]
#[must_use]
pub const fn ticks(now_ns: u64) -> u64 {
    now_ns << TICK_BITS
}

/// Tells whether a clock has not been in use for an hour or longer before `now` ticks, so that it can be set to
/// [`UNUSED`] without a packet passing or dropped that would not be else.
///
/// One that has not been in use for 3.7 hours can't be told from one that is ahead, and counts as that.
#[must_use]
pub const fn is_long_idle(clock: u64, now: u64) -> bool {
    clock != UNUSED
        && now.wrapping_sub(clock) >= LONG_IDLE
        && now.wrapping_sub(clock) < MAX_WINDOW.wrapping_neg()
}

/// Of two states of a clock the one that is further ahead of `now`, all in ticks. One that seems further
/// ahead than any clock can be is idle.
#[must_use]
pub const fn further(one: u64, other: u64, now: u64) -> u64 {
    if one == UNUSED || other == UNUSED {
        return one | other;
    }
    let (one_ahead, other_ahead) = (one.wrapping_sub(now), other.wrapping_sub(now));
    if other_ahead <= MAX_WINDOW && (other_ahead > one_ahead || one_ahead > MAX_WINDOW) { other } else { one }
}

/// A rate and the burst it tolerates, in the units of a clock.
///
/// The all-zero value holds no rate at all; [`Meter::is_set`] tells.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meter {
    /// Ticks that one byte takes; zero if the meter is not set.
    ticks_per_byte: u64,
    /// How far a clock may be ahead of now for a packet still to conform, in ticks.
    tolerance: u64,
}

const _: () = assert!(size_of::<Meter>() == 16);

/// What a meter says of a packet, given the state of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The packet conforms; the clock is to be moved to `clock`.
    Conforms {
        /// The clock's next value.
        clock: u64,
    },
    /// The packet is over the limit, and nothing is charged.
    Over,
}

impl Meter {
    /// A meter that is not set: every packet conforms to it and none is charged.
    pub const UNSET: Self = Self { ticks_per_byte: 0, tolerance: 0 };

    /// Makes a meter for `rate` bit/s that lets `burst` bytes through at once.
    ///
    /// `rate` is held to [`MIN_RATE`]`..=`[`MAX_RATE`]. A burst which the clock can't express
    /// ([`Meter::largest_burst`]) is shortened to the longest that it can.
    #[must_use]
    pub const fn new(rate: u64, burst: u64) -> Self {
        let rate = clamp(rate, MIN_RATE, MAX_RATE);
        let byte_at_1bps = 8_000_000_000u64 << TICK_BITS;
        let ticks_per_byte = (byte_at_1bps + rate / 2) / rate;
        Self { ticks_per_byte, tolerance: clamp(burst, 0, Self::largest_burst(rate)) * ticks_per_byte }
    }

    /// Longest burst, in bytes, that a clock can express at `rate` bit/s: 73 minutes' worth.
    #[must_use]
    pub const fn largest_burst(rate: u64) -> u64 {
        let rate = clamp(rate, MIN_RATE, MAX_RATE);
        let ticks_per_byte = ((8_000_000_000u64 << TICK_BITS) + rate / 2) / rate;
        MAX_WINDOW / ticks_per_byte - MAX_CHARGE
    }

    /// Tells whether the meter holds a rate.
    #[inline(always)]
    #[must_use]
    pub const fn is_set(&self) -> bool {
        self.ticks_per_byte != 0
    }

    /// How far a clock can be ahead of now by conforming packets, in ticks. One that seems further ahead was moved
    /// by another CPU since the time was read; or, by more than [`LONGEST_STALL`], has been idle for so long that it
    /// wrapped.
    #[inline(always)]
    const fn window(&self) -> u64 {
        self.tolerance.wrapping_add(self.ticks_per_byte.wrapping_mul(MAX_CHARGE))
    }

    /// Ticks that `bytes` take at the meter's rate.
    #[inline(always)]
    #[must_use]
    pub const fn cost(&self, bytes: u64) -> u64 {
        let bytes = if bytes > MAX_CHARGE { MAX_CHARGE } else { bytes };
        bytes * self.ticks_per_byte
    }

    /// Judges a packet of `bytes` at `now` ticks, the clock standing at `clock`.
    ///
    /// An idle clock is lifted to now, so that unused capacity is not saved up beyond the burst.
    #[inline(always)]
    #[must_use]
    pub const fn arrive(&self, clock: u64, now: u64, bytes: u64) -> Arrival {
        let ahead = clock.wrapping_sub(now);
        if clock == UNUSED || ahead > self.window().wrapping_add(LONGEST_STALL) {
            Arrival::Conforms { clock: now.wrapping_add(self.cost(bytes)) }
        } else if ahead > self.tolerance {
            Arrival::Over
        } else {
            Arrival::Conforms { clock: clock.wrapping_add(self.cost(bytes)) }
        }
    }

    /// Next value of a clock that is charged whatever it says, as guaranteed traffic charges its
    /// provider's aggregate. It never runs further ahead than conforming packets can take it.
    #[inline(always)]
    #[must_use]
    pub const fn charge(&self, clock: u64, now: u64, bytes: u64) -> u64 {
        let ahead = clock.wrapping_sub(now);
        let window = self.window();
        let ahead = if clock == UNUSED || ahead > window.wrapping_add(LONGEST_STALL) { 0 } else { ahead };
        // Both terms are below 2^63. It never goes back, whatever was read as now.
        let next = ahead + self.cost(bytes);
        let most = if ahead > window { ahead } else { window };
        now.wrapping_add(if next > most { most } else { next })
    }
}

const fn clamp(value: u64, low: u64, high: u64) -> u64 {
    if value < low {
        low
    } else if value > high {
        high
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Offers `packets` of `bytes` each, `gap_ns` apart, and returns the bytes that conformed.
    fn offer(meter: &Meter, bytes: u64, gap_ns: u64, packets: u64) -> u64 {
        let mut clock = 0;
        let mut passed = 0;
        for i in 0..packets {
            if let Arrival::Conforms { clock: next } = meter.arrive(clock, ticks(1_000 + i * gap_ns), bytes) {
                clock = next;
                passed += bytes;
            }
        }
        passed
    }

    #[test]
    fn rate_is_exact_at_both_ends_of_the_range() {
        // (bit/s, bytes a packet, gap in ns, packets): offered at twice the rate.
        for (rate, bytes, gap, packets) in [
            (MIN_RATE, 125, 500_000_000, 20_000),
            (1_000_000, 1_500, 6_000_000, 20_000),
            (10_000_000_000, 1_500, 600, 2_000_000),
            (MAX_RATE, 1_500, 15, 2_000_000),
        ] {
            let passed = offer(&Meter::new(rate, 3_000), bytes, gap, packets) as f64;
            let exact = rate as f64 / 8e9 * (gap * packets) as f64;
            let slack = (3_000 + 2 * bytes) as f64;
            assert!(
                (passed - exact).abs() <= exact * 1e-4 + slack,
                "{rate} bit/s: {passed} bytes passed, {exact} were due"
            );
        }
    }

    /// Else a CPU that stood still for a moment would give all a burst anew.
    #[test]
    fn a_clock_that_others_moved_on_since_the_time_was_read_is_not_idle() {
        for (rate, burst) in
            [(MIN_RATE, 100), (1_000_000, 1_500), (10_000_000_000, 125_000_000), (MAX_RATE, 0)]
        {
            let meter = Meter::new(rate, burst);
            for now in [ticks(5_000_000_000), u64::MAX - 10, 1 << 62, 3 << 62] {
                let clock = now.wrapping_add(meter.window());
                for stall in [0, 1, 51_000, 53_000, 1_000_000, 1_000_000_000, 60_000_000_000] {
                    let read = now.wrapping_sub(ticks(stall));
                    assert_eq!(meter.arrive(clock, read, 64), Arrival::Over, "{rate} bit/s, {stall} ns");
                    assert_eq!(meter.charge(clock, read, 64), clock, "{rate} bit/s, {stall} ns");
                }
            }
        }
    }

    #[test]
    fn unused_capacity_is_not_saved_beyond_the_burst() {
        let meter = Meter::new(8_000_000, 10_000); // a byte a microsecond
        let now = ticks(1 << 40);
        let mut clock = now.wrapping_sub(ticks(3_600_000_000_000));
        let mut passed = 0;
        while let Arrival::Conforms { clock: next } = meter.arrive(clock, now, 1_000) {
            clock = next;
            passed += 1;
        }
        // The burst, and the packet that uses up its last byte.
        assert_eq!(passed, 11);
    }

    #[test]
    fn over_limit_charges_nothing() {
        let meter = Meter::new(1_000_000, 0);
        let now = ticks(5_000_000_000);
        let Arrival::Conforms { clock } = meter.arrive(now, now, 1_500) else {
            panic!("an idle clock conforms")
        };
        assert_eq!(meter.arrive(clock, now, 64), Arrival::Over);
    }

    #[test]
    fn clock_survives_the_wrap_of_time() {
        let meter = Meter::new(8_000_000, 2_000);
        let now = u64::MAX - ticks(500_000);
        let Arrival::Conforms { clock } = meter.arrive(now, now, 1_000) else { panic!("conforms") };
        assert!(clock < now, "the clock wrapped");
        let Arrival::Conforms { clock } = meter.arrive(clock, now, 2_000) else { panic!("within the burst") };
        assert_eq!(meter.arrive(clock, now.wrapping_add(ticks(900_000)), 1), Arrival::Over);
        assert!(matches!(
            meter.arrive(clock, now.wrapping_add(ticks(1_001_000)), 1),
            Arrival::Conforms { .. }
        ));
    }

    #[test]
    fn a_clock_that_was_never_used_conforms_at_any_time() {
        let meter = Meter::new(MIN_RATE, 100);
        for before_wrap in [1, 1_000_000, 900_000_000, 100_000_000_000, 500_000_000_000] {
            let now = ticks(0).wrapping_sub(ticks(before_wrap));
            let Arrival::Conforms { clock } = meter.arrive(UNUSED, now, 42) else {
                panic!("{before_wrap} ns before the wrap")
            };
            assert_eq!(clock, now.wrapping_add(meter.cost(42)));
            assert_eq!(meter.charge(UNUSED, now, 42), clock);
            assert_eq!((further(UNUSED, clock, now), further(clock, UNUSED, now)), (clock, clock));
        }
    }

    #[test]
    fn only_a_clock_that_is_behind_for_long_is_long_idle() {
        let second = 1_000_000_000;
        for now in [ticks(5 * second), u64::MAX - 10, 1 << 62, 3 << 62, ticks(9_000 * second)] {
            let behind = |seconds: u64| now.wrapping_sub(ticks(seconds * second));
            for (clock, expected) in [
                (UNUSED, false),
                (behind(0), false),
                (behind(3_599), false),
                (behind(3_601), true),
                (behind(3 * 3_600), true),
                (now.wrapping_add(1), false),
                (now.wrapping_add(MAX_WINDOW), false),
            ] {
                assert_eq!(is_long_idle(clock, now), expected, "{clock} at {now}");
            }
        }
        // What it is good for: nearly a wrap later it looks to be ahead.
        let (meter, now) = (Meter::new(1_000_000, 1_500), ticks(1 << 50));
        let clock = now.wrapping_add(meter.window());
        assert_eq!(meter.arrive(clock, now, 64), Arrival::Over);
    }

    #[test]
    fn charging_by_force_never_looks_stale() {
        let meter = Meter::new(1_000_000, 1_500);
        let now = ticks(7_000_000_000);
        let mut clock = now;
        for _ in 0..10_000 {
            clock = meter.charge(clock, now, 1_500);
        }
        assert_eq!(meter.arrive(clock, now, 64), Arrival::Over);
    }

    #[test]
    fn of_two_states_the_one_further_ahead_is_taken() {
        // Also where the counter wraps between them, and whatever the time is for a clock never used.
        for now in [ticks(5_000_000_000), u64::MAX - 10, 1 << 62, 3 << 62] {
            let (near, far, past) = (now.wrapping_add(5), now.wrapping_add(50), now.wrapping_sub(5));
            for (one, other, expected) in
                [(near, far, far), (far, near, far), (past, near, near), (near, past, near), (far, far, far)]
            {
                assert_eq!(further(one, other, now), expected, "{one} or {other} at {now}");
            }
        }
    }

    proptest! {
        #[test]
        fn long_run_never_exceeds_rate_and_burst(
            rate in MIN_RATE..=MAX_RATE,
            burst in 0u64..1_000_000,
            start in any::<u64>(),
            arrivals in prop::collection::vec((0u64..5_000_000, 1u64..=65_536), 1..300),
        ) {
            let meter = Meter::new(rate, burst);
            let burst = burst.min(Meter::largest_burst(rate));
            let (mut now, mut clock, mut passed) = (start >> TICK_BITS, ticks(start >> TICK_BITS), 0u128);
            let begin = now;
            for (gap, bytes) in arrivals {
                now += gap;
                if let Arrival::Conforms { clock: next } = meter.arrive(clock, ticks(now), bytes) {
                    clock = next;
                    passed += u128::from(bytes);
                }
            }
            let due = u128::from(rate) * u128::from(now - begin) / 8_000_000_000;
            let bound = due + due / 10_000 + u128::from(burst) + 65_536 + 1;
            prop_assert!(passed <= bound, "{} bytes passed, at most {} may", passed, bound);
        }

        #[test]
        fn a_clock_that_is_looked_after_does_what_one_without_a_wrap_does(
            // The lower the rate, the longer a clock that wrapped looks to be ahead.
            rate in prop_oneof![MIN_RATE..=10_000, MIN_RATE..=MAX_RATE],
            burst in 0u64..1_000_000,
            start in 0u64..1 << 60,
            interval in 60_000_000_000u64..=7_200_000_000_000,
            arrivals in prop::collection::vec(
                (prop_oneof![0u64..5_000_000, 0u64..80_000_000_000_000], 1u64..=65_536, 1usize..20, any::<bool>()),
                1..20,
            ),
        ) {
            let meter = Meter::new(rate, burst);
            let (mut clock, mut endless) = (UNUSED, 0u128);
            let (mut now, mut look_at) = (start, start + interval / 2);
            for (gap, bytes, packets, forced) in arrivals {
                now += gap;
                while look_at <= now {
                    if is_long_idle(clock, ticks(look_at)) {
                        clock = UNUSED;
                    }
                    look_at += interval;
                }
                let endless_now = u128::from(now) << TICK_BITS;
                let cost = u128::from(meter.cost(bytes));
                for _ in 0..packets {
                    if forced {
                        clock = meter.charge(clock, ticks(now), bytes);
                        endless = (endless.max(endless_now) + cost).min(endless_now + u128::from(meter.window()));
                        continue;
                    }
                    let conforms = endless.saturating_sub(endless_now) <= u128::from(meter.tolerance);
                    match meter.arrive(clock, ticks(now), bytes) {
                        Arrival::Conforms { clock: next } => {
                            prop_assert!(conforms, "a packet passes that is over the limit");
                            clock = next;
                            endless = endless.max(endless_now) + cost;
                        }
                        Arrival::Over => prop_assert!(!conforms, "a packet that conforms is dropped"),
                    }
                }
            }
        }

        #[test]
        fn an_exact_model_agrees(
            rate in MIN_RATE..=MAX_RATE,
            burst in 0u64..100_000,
            arrivals in prop::collection::vec((0u64..50_000_000, 1u64..=9_216), 1..200),
        ) {
            // The same algorithm in exact rational arithmetic: time in units of 1/rate ns.
            let meter = Meter::new(rate, burst);
            let burst = burst.min(Meter::largest_burst(rate));
            let (mut now, mut clock) = (1u64, ticks(1));
            let mut exact = u128::from(now) * u128::from(rate);
            for (gap, bytes) in arrivals {
                now += gap;
                let exact_now = u128::from(now) * u128::from(rate);
                let exact_tolerance = u128::from(burst) * 8_000_000_000;
                let ahead = exact.saturating_sub(exact_now);
                let conforms = ahead <= exact_tolerance;
                // Within 0.01 % of the threshold either answer is right.
                let near = ahead.abs_diff(exact_tolerance) <= exact_tolerance / 10_000 + u128::from(rate);
                match meter.arrive(clock, ticks(now), bytes) {
                    Arrival::Conforms { clock: next } => {
                        prop_assert!(conforms || near);
                        clock = next;
                        exact = exact.max(exact_now) + u128::from(bytes) * 8_000_000_000;
                    }
                    Arrival::Over => prop_assert!(!conforms || near),
                }
            }
        }
    }
}
