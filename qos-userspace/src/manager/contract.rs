//! Contracts held against what is asked, what is taken, and what a change of them would leave behind.

use std::collections::BTreeMap;

use super::decide::{check_rate, given, list};
use super::{Refusal, RefusalCode, State, direction_field, direction_word};
use crate::domain::level::LAST_PRIORITY;
use crate::domain::{Allocation, Application, BitsPerSecond, Contract, Directed, Direction, Name, Provider};

/// Whose contract: a provider's, or that of one of its applications.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Party {
    pub(super) provider: Name,
    pub(super) application: Option<Name>,
}

impl Party {
    /// The parties that an allocation is charged to: the provider, and the application that it named.
    pub(super) fn of(allocation: &Allocation) -> impl Iterator<Item = Self> {
        let provider = allocation.provider.clone();
        let application = allocation.application.clone().map(Some);
        [None]
            .into_iter()
            .chain(application)
            .map(move |application| Self { provider: provider.clone(), application })
    }
}

impl std::fmt::Display for Party {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.application {
            Some(application) => write!(f, "application {application} of provider {}", self.provider),
            None => write!(f, "provider {}", self.provider),
        }
    }
}

/// What the allocations of a party take of its contract.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) allocations: u32,
    /// Sums of their guarantees, in bit/s.
    guaranteed: Directed<u64>,
    /// Sums of their maxima, in bit/s.
    maximum: Directed<u64>,
}

impl Taken {
    fn add(&mut self, allocation: &Allocation) {
        self.allocations += 1;
        for (direction, rate) in given(&allocation.level.guaranteed) {
            *self.guaranteed.get_mut(direction) += rate.0;
        }
        for (direction, rate) in given(&allocation.level.maximum) {
            *self.maximum.get_mut(direction) += rate.0;
        }
    }

    fn remove(&mut self, allocation: &Allocation) {
        self.allocations -= 1;
        for (direction, rate) in given(&allocation.level.guaranteed) {
            *self.guaranteed.get_mut(direction) -= rate.0;
        }
        for (direction, rate) in given(&allocation.level.maximum) {
            *self.maximum.get_mut(direction) -= rate.0;
        }
    }
}

/// What all parties take. One that takes nothing is not in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct TakenByParty(BTreeMap<Party, Taken>);

impl TakenByParty {
    pub(super) fn of(&self, party: &Party) -> Taken {
        self.0.get(party).copied().unwrap_or_default()
    }

    /// What a party takes without some allocations.
    fn without(&self, party: &Party, gone: &[&Allocation]) -> Taken {
        let mut taken = self.of(party);
        for other in gone.iter().filter(|other| Party::of(other).any(|of| of == *party)) {
            taken.remove(other);
        }
        taken
    }

    pub(super) fn add(&mut self, allocation: &Allocation) {
        for party in Party::of(allocation) {
            self.0.entry(party).or_default().add(allocation);
        }
    }

    pub(super) fn remove(&mut self, allocation: &Allocation) {
        for party in Party::of(allocation) {
            if let Some(taken) = self.0.get_mut(&party) {
                taken.remove(allocation);
                if taken.allocations == 0 {
                    self.0.remove(&party);
                }
            }
        }
    }
}

/// Checks a contract by itself. Rates above the link's are told as warnings.
pub(super) fn check_contract(
    state: &State,
    contract: &Contract,
    warnings: &mut Vec<String>,
) -> Result<(), Refusal> {
    for (word, rates) in [("guaranteed", &contract.guaranteed), ("maximum", &contract.maximum)] {
        for (direction, rate) in given(rates) {
            check_rate(&format!("contract.{word}.{}", direction_field(direction)), rate)?;
            let link = *state.network.link.get(direction);
            if rate > link {
                let direction = direction_word(direction);
                warnings.push(format!("{word} {direction}: {rate} is above the link's {link}"));
            }
        }
    }
    for (direction, guaranteed) in given(&contract.guaranteed) {
        if let Some(maximum) = contract.maximum.get(direction).filter(|maximum| *maximum < guaranteed) {
            let field = format!("contract.guaranteed.{}", direction_field(direction));
            return Err(Refusal::invalid(field, guaranteed, &format!("is above the maximum of {maximum}")));
        }
    }
    if contract.best_priority > LAST_PRIORITY {
        let reason = "is out of range: 0 (any) to 7 (the last only)";
        return Err(Refusal::invalid("contract.best_priority", contract.best_priority, reason));
    }
    for name in contract.profiles.iter().flatten() {
        if !state.profiles.contains_key(name) {
            let known = &mut state.profiles.keys();
            return Err(Refusal::unknown("contract.profiles", "profile", name, known));
        }
    }
    Ok(())
}

/// Whether the contracts of who asks admit an allocation beside what they have.
pub(super) fn admit(
    state: &State,
    provider: &Provider,
    application: Option<&Application>,
    allocation: &Allocation,
    without: &[&Allocation],
) -> Result<(), Refusal> {
    let contracts = [Some(&provider.contract), application.map(|application| &application.contract)];
    for (party, contract) in Party::of(allocation).zip(contracts.into_iter().flatten()) {
        may_ask(&party, contract, allocation)?;
        fits(&party, contract, &state.index.taken.without(&party, without), allocation)?;
    }
    Ok(())
}

/// The most that the contracts of who asks let be guaranteed more in a direction; none: they don't say.
pub(super) fn left(
    state: &State,
    provider: &Provider,
    application: Option<&Application>,
    direction: Direction,
    without: &[&Allocation],
) -> Option<BitsPerSecond> {
    let own = |application: Option<&Application>| Party {
        provider: provider.name.clone(),
        application: application.map(|application| application.name.clone()),
    };
    let contracts =
        [Some((own(None), &provider.contract)), application.map(|known| (own(application), &known.contract))];
    let left = contracts.into_iter().flatten().flat_map(|(party, contract)| {
        let taken = *state.index.taken.without(&party, without).guaranteed.get(direction);
        let most = [*contract.guaranteed.get(direction), *contract.maximum.get(direction)];
        most.into_iter().flatten().map(move |most| BitsPerSecond(most.0.saturating_sub(taken)))
    });
    left.min()
}

/// What a contract says of a request whatever else is granted.
fn may_ask(party: &Party, contract: &Contract, allocation: &Allocation) -> Result<(), Refusal> {
    if let Some(profiles) = &contract.profiles
        && !allocation.profile.as_ref().is_some_and(|name| profiles.contains(name))
    {
        let value = allocation.profile.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
        let may = list(&mut profiles.iter()).unwrap_or_else(|| "no profile".to_owned());
        let message = format!("profile: {value} is not in the contract of {party}, which has {may}");
        return Err(Refusal::new(RefusalCode::Forbidden, "profile", value, message));
    }
    let priority = allocation.level.priority;
    if priority < contract.best_priority {
        let message = format!(
            "level.priority: {priority} is better than {}, the best in the contract of {party}",
            contract.best_priority
        );
        return Err(Refusal::new(RefusalCode::Forbidden, "level.priority", priority, message));
    }
    Ok(())
}

/// Whether there is room in a contract.
fn fits(party: &Party, contract: &Contract, taken: &Taken, allocation: &Allocation) -> Result<(), Refusal> {
    if let Some(most) = contract.allocations.filter(|most| taken.allocations >= *most) {
        let (field, value) = match &party.application {
            Some(application) => ("application", application),
            None => ("provider", &party.provider),
        };
        let message = format!(
            "contract of {party}: asked one allocation more, and {} of {most} are in use",
            taken.allocations
        );
        return Err(Refusal::new(RefusalCode::InsufficientCapacity, field, value, message));
    }
    for direction in Direction::BOTH {
        let guaranteed = *allocation.level.guaranteed.get(direction);
        let maximum = *allocation.level.maximum.get(direction);
        let promised = *taken.guaranteed.get(direction);
        for most in [contract.guaranteed.get(direction), contract.maximum.get(direction)] {
            if let (Some(asked), Some(most)) = (guaranteed, most) {
                beyond(party, "guaranteed", direction, asked, *most, promised)?;
            }
        }
        let (Some(most), Some(_)) = (*contract.maximum.get(direction), &party.application) else { continue };
        if !allocation.covers(direction) {
            continue;
        }
        let field = format!("level.maximum.{}", direction_field(direction));
        match maximum {
            Some(asked) => {
                beyond(party, "maximum", direction, asked, most, *taken.maximum.get(direction))?;
            }
            None => {
                let reason =
                    format!("is asked for, and the contract of {party} sums maxima to {most}: name one");
                return Err(Refusal::invalid(field, "nothing", &reason));
            }
        }
    }
    Ok(())
}

fn beyond(
    party: &Party,
    word: &str,
    direction: Direction,
    asked: BitsPerSecond,
    most: BitsPerSecond,
    taken: u64,
) -> Result<(), Refusal> {
    let left = BitsPerSecond(most.0.saturating_sub(taken));
    if asked <= left {
        return Ok(());
    }
    let field = format!("level.{word}.{}", direction_field(direction));
    let message = format!(
        "contract of {party}, {word} {}: asked {asked}, left {left} of {most}",
        direction_word(direction)
    );
    Err(Refusal::new(RefusalCode::InsufficientCapacity, field, asked, message))
}

/// What is granted and would not be under `contract`, one text each. It stays until it ends.
pub(super) fn left_behind(state: &State, party: &Party, contract: &Contract) -> Vec<String> {
    let taken = state.index.taken.of(party);
    let mut texts = Vec::new();
    if let Some(most) = contract.allocations.filter(|most| taken.allocations > *most) {
        texts.push(format!("{} allocations are in use, {most} in the contract", taken.allocations));
    }
    for direction in Direction::BOTH {
        let sums = [
            ("guaranteed", taken.guaranteed.get(direction), contract.guaranteed.get(direction)),
            ("guaranteed", taken.guaranteed.get(direction), contract.maximum.get(direction)),
            ("maximum", taken.maximum.get(direction), contract.maximum.get(direction)),
        ];
        for (number, (word, taken, most)) in sums.into_iter().enumerate() {
            let summed = number < 2 || party.application.is_some();
            if let Some(most) = most.filter(|most| summed && most.0 < *taken) {
                texts.push(format!(
                    "{word} {}: {} in use, {most} in the contract",
                    direction_word(direction),
                    BitsPerSecond(*taken)
                ));
            }
        }
    }
    texts.dedup();
    let summary = texts.len();
    for allocation in state.allocations.values() {
        let is_partys = Party::of(allocation).any(|of| of == *party);
        if !is_partys {
            continue;
        }
        let line = match &allocation.session {
            Some(session) => format!("line {session}"),
            None => "the link".to_owned(),
        };
        match may_ask(party, contract, allocation) {
            Err(refusal) => texts.push(format!("allocation {} on {line}: {refusal}", allocation.id)),
            Ok(()) if summary > 0 => texts.push(format!("allocation {} on {line} counts", allocation.id)),
            Ok(()) => {}
        }
    }
    texts
}
