//! What a provider's program may see and touch: its own. Everything that tells one provider from another is here.
//!
//! Commands are held against it before they are decided, and texts are told to it without what is another's,
//! whatever API they came by. The history keeps the full text for the operator.

use std::borrow::Cow;

use super::record::{Actor, Record};
use super::{Command, Refusal, RefusalCode, State};
use crate::domain::{Allocation, AllocationId, Application, Name};

/// Whose things are one's own: a provider's, or only those of one of its applications.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// The provider.
    pub provider: Name,
    /// The one application; none: all, and what names none.
    pub application: Option<Name>,
}

/// What may be named in a text although nothing that lives says so.
#[derive(Clone, Copy, Debug, Default)]
struct Named<'a> {
    allocation: Option<AllocationId>,
    line: Option<&'a Name>,
}

impl Own {
    /// What the actor is confined to; none: it is the operator, who may see and touch everything.
    #[must_use]
    pub fn of(actor: &Actor) -> Option<Self> {
        match actor {
            Actor::Client { provider, application, .. } => {
                Some(Self { provider: provider.clone(), application: application.clone() })
            }
            Actor::Daemon | Actor::User(_) | Actor::Source(_) => None,
        }
    }

    /// Whether an allocation is its own.
    #[must_use]
    pub fn has(&self, allocation: &Allocation) -> bool {
        allocation.provider == self.provider && self.is_for(allocation.application.as_ref())
    }

    /// Whether an application is its own.
    #[must_use]
    pub fn has_application(&self, application: &Application) -> bool {
        application.provider == self.provider && self.is_for(Some(&application.name))
    }

    /// Whether a line carries something of its own.
    #[must_use]
    pub fn is_on(&self, state: &State, line: &Name) -> bool {
        state.allocations_on(line).any(|allocation| self.has(allocation))
    }

    fn is_for(&self, application: Option<&Name>) -> bool {
        self.application.is_none() || self.application.as_ref() == application
    }

    /// Whether it may ask for this. What it asks for may be refused all the same.
    ///
    /// # Errors
    /// Where it is for something of another, which is then said not to be there.
    pub fn may_ask(&self, state: &State, command: &Command) -> Result<(), Refusal> {
        match command {
            Command::Grant(request) => {
                if request.provider != self.provider {
                    return Err(not_there("provider", "provider", &request.provider));
                }
                match (&self.application, &request.application) {
                    (Some(own), Some(asked)) if own != asked => {
                        Err(not_there("application", "application", asked))
                    }
                    (Some(own), None) => {
                        let message =
                            format!("application: name {own}, the only one that this client is for");
                        Err(Refusal::new(RefusalCode::Forbidden, "application", "none", message))
                    }
                    _ => Ok(()),
                }
            }
            Command::Extend { id, .. } | Command::Revoke { id } => {
                match state.allocations.get(id).filter(|allocation| self.has(allocation)) {
                    Some(_) => Ok(()),
                    // The same for one that never was, has ended, or is another's.
                    None => Err(not_there("id", "allocation in force", id)),
                }
            }
            Command::AddProvider(_)
            | Command::RemoveProvider { .. }
            | Command::AddApplication { .. }
            | Command::ChangeContract { .. }
            | Command::RemoveApplication { .. }
            | Command::AddSession(_)
            | Command::StartSession(_)
            | Command::StopSession { .. }
            | Command::RemoveSession { .. }
            | Command::PutSegment(_)
            | Command::RemoveSegment { .. }
            | Command::PutProfile(_)
            | Command::RemoveProfile { .. }
            | Command::AddKey(_)
            | Command::RemoveKey { .. }
            | Command::Expire => {
                let message = "only the operator may ask for this".to_owned();
                Err(Refusal {
                    code: RefusalCode::Forbidden,
                    field: None,
                    value: None,
                    message,
                    counter_offer: None,
                })
            }
        }
    }

    /// A text without the names and numbers of what is another's.
    #[must_use]
    pub fn told(&self, state: &State, text: &str) -> String {
        self.told_of(state, text, Named::default())
    }

    /// A refusal likewise.
    #[must_use]
    pub fn told_refusal(&self, state: &State, refusal: Refusal) -> Refusal {
        let message = self.told(state, &refusal.message);
        // It is the line's name.
        let is_hidden = refusal.code == RefusalCode::SessionDown && message != refusal.message;
        Refusal { value: refusal.value.filter(|_| !is_hidden), message, ..refusal }
    }

    /// One of its own allocations likewise.
    #[must_use]
    pub fn told_allocation(&self, state: &State, allocation: &Allocation) -> Allocation {
        let named = Named { allocation: Some(allocation.id), line: allocation.session.as_ref() };
        let reason = allocation.reason.as_ref().map(|reason| self.told_of(state, reason, named));
        Allocation { reason, ..allocation.clone() }
    }

    /// One of the records that concern it likewise, with only its own programs by name.
    #[must_use]
    pub fn told_record(&self, state: &State, record: Record) -> Record {
        let line = record.session.as_ref().filter(|line| {
            // An allocation names its line; a request that was refused does not get to know it.
            record.allocation.is_some() || self.is_on(state, line)
        });
        let named = Named { allocation: record.allocation, line };
        let reason = record.reason.as_ref().map(|reason| self.told_of(state, reason, named));
        let actor = match Actor::is_client_of(&record.actor, &self.provider) {
            true => record.actor.clone(),
            false => "operator".to_owned(),
        };
        Record { session: line.cloned(), reason, actor, ..record }
    }

    fn told_of(&self, state: &State, text: &str, named: Named<'_>) -> String {
        let mut told = String::with_capacity(text.len());
        let mut rest = text;
        let mut before = "";
        while let Some((separators, word, after)) = next_word(rest) {
            told.push_str(separators);
            let (words, after) = self.told_word(state, before, word, after, named);
            told.push_str(&words);
            (before, rest) = (word, after);
        }
        told.push_str(rest);
        told
    }

    /// What stands for a word and, where it announces a name or numbers, for these, and the text after it.
    fn told_word<'t>(
        &self,
        state: &State,
        before: &str,
        word: &'t str,
        after: &'t str,
        named: Named<'_>,
    ) -> (Cow<'t, str>, &'t str) {
        let as_it_is = (Cow::Borrowed(word), after);
        let name =
            after.strip_prefix(' ').and_then(next_word).filter(|(separators, ..)| separators.is_empty());
        let Some((_, name, beyond)) = name else { return as_it_is };
        match word {
            "allocation" => {
                let (ids, beyond) = numbers(&after[1..]);
                let is_own = |id: &AllocationId| {
                    named.allocation == Some(*id)
                        || state.allocations.get(id).is_some_and(|allocation| self.has(allocation))
                };
                match ids.is_empty() || ids.iter().all(is_own) {
                    true => as_it_is,
                    false => (Cow::Borrowed("another allocation"), beyond),
                }
            }
            "provider" if name != self.provider.as_str() => (Cow::Borrowed("another provider"), beyond),
            "segment" => (Cow::Borrowed("a shared segment"), beyond),
            "line" | "session" => {
                // "the line loses 0.1": prose.
                if before == "the" && matches!(name, "comes" | "is" | "loses") {
                    return as_it_is;
                }
                // A name may end in a full stop, and so may a sentence.
                let is_own = |line: Name| named.line == Some(&line) || self.is_on(state, &line);
                let own = [name, name.trim_end_matches('.')];
                if own.into_iter().filter_map(|name| name.parse().ok()).any(is_own) {
                    return as_it_is;
                }
                let neutral = match before {
                    "the" => "line",
                    "to" => "another line",
                    _ => "the line",
                };
                (Cow::Borrowed(neutral), beyond)
            }
            _ => as_it_is,
        }
    }
}

fn not_there(field: &str, what: &str, name: &impl ToString) -> Refusal {
    let name = name.to_string();
    let message = format!("{field}: there is no {what} {name}");
    Refusal::new(RefusalCode::NotFound, field, name, message)
}

/// What stands before the next word, the word, and what follows it. Words are what names are made of.
fn next_word(text: &str) -> Option<(&str, &str, &str)> {
    let is_of_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let start = text.find(is_of_word)?;
    let length = text[start..].find(|c| !is_of_word(c)).unwrap_or(text.len() - start);
    Some((&text[..start], &text[start..start + length], &text[start + length..]))
}

/// The numbers that a text begins with, as a list has them ("1, 2 and 3 more"), and what follows.
fn numbers(text: &str) -> (Vec<AllocationId>, &str) {
    let mut ids = Vec::new();
    let mut rest = text;
    loop {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let Ok(id) = rest[..digits].parse() else { return (ids, rest) };
        ids.push(AllocationId(id));
        rest = &rest[digits..];
        let next = rest.strip_prefix(", ").or_else(|| rest.strip_prefix(" and "));
        if let Some(beyond) = rest.strip_prefix(" more") {
            // That was how many, and no number of one.
            return (ids, beyond);
        }
        match next.filter(|next| next.starts_with(|c: char| c.is_ascii_digit())) {
            Some(next) => rest = next,
            None => return (ids, rest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::tests::{grant_on_line, town};

    /// Acme has an allocation, 1, on dsl-1; the provider isp has 2 there too.
    fn state() -> State {
        let (mut state, _) = town();
        for (number, provider) in [(1, "acme"), (2, "isp")] {
            let decision =
                crate::manager::decide(&state, &grant_on_line(number), jiff::Timestamp::UNIX_EPOCH);
            for change in decision.expect("granted").changes {
                let crate::manager::Change::PutAllocation(mut allocation) = change else { continue };
                allocation.provider = provider.parse().expect("a name");
                state.apply(&crate::manager::Change::PutAllocation(allocation));
            }
        }
        state
    }

    #[test]
    fn texts_are_told_without_what_is_anothers() {
        let state = state();
        let own = Own { provider: "acme".parse().expect("a name"), application: None };
        for (text, expected) in [
            ("line dsl-1 downstream: asked 20 Mbit/s, left 12.5 Mbit/s", None),
            (
                "line dsl-2 downstream: asked 20 Mbit/s, left 12.5 Mbit/s",
                Some("the line downstream: asked 20 Mbit/s, left 12.5 Mbit/s"),
            ),
            ("line gone.", Some("the line")),
            (
                "segment dslam-7 downstream: asked 1, left 0",
                Some("a shared segment downstream: asked 1, left 0"),
            ),
            ("link downstream: asked 20 Mbit/s, left 12.5 Mbit/s", None),
            ("contract of application video of provider acme: asked one allocation more", None),
            ("selectors[0]: `down udp from 192.0.2.1:1-2` is hidden by allocation 1", None),
            (
                "selectors[0]: `down udp` is hidden by allocation 2",
                Some("selectors[0]: `down udp` is hidden by another allocation"),
            ),
            ("selector 3 of allocation 17, which came", Some("selector 3 of another allocation, which came")),
            (
                "allocation 2 of provider isp on line dsl-9 ends: network terminated: preempted by allocation 1 of provider acme",
                Some(
                    "another allocation of another provider on the line ends: network terminated: preempted by \
                     allocation 1 of provider acme",
                ),
            ),
            (
                "held until granted anew: allocation 1, 2 and 3 more",
                Some("held until granted anew: another allocation"),
            ),
            ("its address went to line dsl-2", Some("its address went to another line")),
            (
                "level.loss: line dsl-2: asked 0, the line loses 0.1",
                Some("level.loss: the line: asked 0, the line loses 0.1"),
            ),
            (
                "the maximum of 1 can't be reached, the line dsl-2 has 1",
                Some("the maximum of 1 can't be reached, the line has 1"),
            ),
            ("granted until 2026, unless the line comes back", None),
            ("comes out of the line, where the gateway can't order it", None),
            ("the delay budget is kept on the link only: the line is not known", None),
            ("it takes one allocation more, and 3 of 4 are in use", None),
            ("", None),
        ] {
            assert_eq!(own.told(&state, text), expected.unwrap_or(text), "{text}");
        }
    }

    #[test]
    fn only_requests_for_its_own_are_let_through() {
        let state = state();
        let own = Own { provider: "acme".parse().expect("a name"), application: None };
        let id = |id| Command::Revoke { id: AllocationId(id) };
        assert_eq!(own.may_ask(&state, &id(1)), Ok(()));
        let of_another = own.may_ask(&state, &id(2)).expect_err("another's");
        let never = own.may_ask(&state, &id(7)).expect_err("never granted");
        assert_eq!(of_another.message.replace('2', "7"), never.message, "nobody can tell which it is");
        assert_eq!(
            own.may_ask(&state, &Command::Expire).map_err(|refusal| refusal.code),
            Err(RefusalCode::Forbidden)
        );
        let part = Own { application: Some("video".parse().expect("a name")), ..own };
        assert_eq!(part.may_ask(&state, &id(1)).map_err(|refusal| refusal.code), Err(RefusalCode::NotFound));
    }
}
