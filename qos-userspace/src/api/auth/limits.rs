//! How often somebody may ask: token buckets.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::Name;

/// Failures to show who one is that an address has at once, and the time in which it gets one back.
const FAILURES: Allowance = Allowance { per_second: 0.2, burst: 10.0 };

/// Addresses above which those that may fail as often as any are forgotten.
const MOST_ADDRESSES: usize = 10_000;

/// How often something may happen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Allowance {
    /// In the long run.
    pub(crate) per_second: f64,
    /// At once, 1 or more.
    pub(crate) burst: f64,
}

/// What is left of an allowance.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    const fn full(allowance: Allowance, now: Instant) -> Self {
        Self { left: allowance.burst, at: now }
    }

    fn fill(&mut self, allowance: Allowance, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        // Also where the allowance has become smaller.
        self.left = (self.left + since * allowance.per_second).min(allowance.burst);
        self.at = now;
    }

    /// The time after which one is left.
    fn wait(&self, allowance: Allowance) -> Option<Duration> {
        let lacking = 1.0 - self.left;
        (lacking > 0.0).then(|| Duration::from_secs_f64(lacking / allowance.per_second))
    }
}

/// Allowances by who has them.
#[derive(Debug)]
struct Buckets<K>(Mutex<HashMap<K, Bucket>>);

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

impl<K: Eq + Hash> Buckets<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Bucket>> {
        // A count that another thread's panic left half-done is a count all the same.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one, or tells how long to wait for it.
    fn take(&self, key: K, allowance: Allowance, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.lock();
        let bucket = buckets.entry(key).or_insert_with(|| Bucket::full(allowance, now));
        bucket.fill(allowance, now);
        if let Some(wait) = bucket.wait(allowance) {
            return Err(wait);
        }
        bucket.left -= 1.0;
        Ok(())
    }
}

/// All allowances of the API for providers.
#[derive(Debug, Default)]
pub(crate) struct Limits {
    /// Their number is that of the providers that the configuration and the API keys name.
    requests: Buckets<Name>,
    failures: Buckets<IpAddr>,
}

impl Limits {
    /// Counts a request of a provider.
    ///
    /// # Errors
    /// Where it has asked too often: the time to wait.
    pub(crate) fn request(&self, provider: &Name, allowance: Allowance) -> Result<(), Duration> {
        self.requests.take(provider.clone(), allowance, Instant::now())
    }

    /// Whether an address may try to show who it is.
    ///
    /// # Errors
    /// Where it has failed too often: the time to wait.
    pub(crate) fn may_try(&self, address: IpAddr) -> Result<(), Duration> {
        let mut failures = self.failures.lock();
        let Some(bucket) = failures.get_mut(&site(address)) else { return Ok(()) };
        bucket.fill(FAILURES, Instant::now());
        bucket.wait(FAILURES).map_or(Ok(()), Err)
    }

    /// Counts a failure of an address to show who it is.
    pub(crate) fn failed(&self, address: IpAddr) {
        let now = Instant::now();
        // Where none is left it has failed while others of its requests did.
        let _ = self.failures.take(site(address), FAILURES, now);
        let mut failures = self.failures.lock();
        if failures.len() > MOST_ADDRESSES {
            failures.retain(|_, bucket| {
                bucket.fill(FAILURES, now);
                bucket.left < FAILURES.burst
            });
        }
        if failures.len() > MOST_ADDRESSES {
            // Nobody is let off by many others' failing: whoever has most left goes first.
            let fullest = failures.iter().max_by(|(_, one), (_, other)| one.left.total_cmp(&other.left));
            if let Some(address) = fullest.map(|(address, _)| *address) {
                failures.remove(&address);
            }
        }
    }
}

/// Who has one address of a /64 has all of them.
pub(crate) fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let prefix = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(prefix))
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_empties_at_once_and_fills_with_time() {
        let buckets = Buckets::default();
        let allowance = Allowance { per_second: 2.0, burst: 3.0 };
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        for _ in 0..3 {
            assert_eq!(buckets.take("a", allowance, start), Ok(()));
        }
        assert_eq!(buckets.take("a", allowance, start), Err(Duration::from_millis(500)));
        assert_eq!(buckets.take("b", allowance, start), Ok(()), "another has its own");
        assert_eq!(buckets.take("a", allowance, at(500)), Ok(()));
        assert!(buckets.take("a", allowance, at(500)).is_err());
        for _ in 0..3 {
            assert_eq!(buckets.take("a", allowance, at(60_000)), Ok(()), "no more than the burst is kept");
        }
        assert!(buckets.take("a", allowance, at(60_000)).is_err());
    }

    #[test]
    fn who_fails_too_often_waits_and_its_neighbours_do_not() {
        let limits = Limits::default();
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        for host in 1..=10 {
            assert_eq!(limits.may_try(address("2001:db8::1")), Ok(()), "{host}");
            limits.failed(address(&format!("2001:db8::{host}")));
        }
        let wait = limits.may_try(address("2001:db8::ffff")).expect_err("one /64 is one site");
        assert!(wait <= Duration::from_secs(5), "{wait:?}");
        assert_eq!(limits.may_try(address("2001:db8:0:1::1")), Ok(()));
        assert_eq!(limits.may_try(address("192.0.2.1")), Ok(()));
        assert_eq!(site(address("::ffff:192.0.2.1")), address("192.0.2.1"));
    }

    #[test]
    fn memory_of_failures_is_bounded() {
        let limits = Limits::default();
        for number in 0..12_000_u32 {
            limits.failed(IpAddr::V4((0x0a00_0000 + number).into()));
        }
        assert!(limits.failures.lock().len() <= MOST_ADDRESSES + 1);
    }
}
