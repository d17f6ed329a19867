//! RADIUS packets as bytes (RFC 2865, 2866): what is in one, whether who sent it knows the secret, and answers.
//!
//! What the attributes of an accounting request mean is for [`super::accounting`] to say. A codec of our own: the
//! crates there are don't compare in constant time, or are not kept any more (docs/adr/0024).

use hmac::{Hmac, KeyInit as _, Mac as _};
use md5::{Digest as _, Md5};
use subtle::ConstantTimeEq as _;

use super::Secret;

/// Longest packet, in bytes (RFC 2865, section 3).
pub(crate) const LONGEST_PACKET: usize = 4_096;

/// A request to take note of something (RFC 2866).
pub(crate) const ACCOUNTING_REQUEST: u8 = 4;
/// A question whether anybody is there (RFC 5997).
pub(crate) const STATUS_SERVER: u8 = 12;
const ACCOUNTING_RESPONSE: u8 = 5;

const PROXY_STATE: u8 = 33;
const MESSAGE_AUTHENTICATOR: u8 = 80;
const VENDOR_SPECIFIC: u8 = 26;

const HEADER: usize = 20;
const AUTHENTICATOR: std::ops::Range<usize> = 4..HEADER;

/// Why bytes are no packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("{0} bytes are no RADIUS packet, which has 20 to 4096")]
    Size(usize),
    #[error("its length field says {told} of {there} bytes")]
    Length { told: usize, there: usize },
    #[error("the attribute at byte {0} does not end inside the packet")]
    Attribute(usize),
}

/// A packet whose attributes all end inside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet<'p> {
    /// As long as its length field says.
    bytes: &'p [u8],
}

/// One attribute, without its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attribute<'p> {
    pub(crate) kind: u8,
    pub(crate) value: &'p [u8],
}

impl<'p> Packet<'p> {
    /// Reads a packet; bytes behind its end are padding.
    ///
    /// # Errors
    /// Where a length is not what it can be.
    pub(crate) fn parse(bytes: &'p [u8]) -> Result<Self, Malformed> {
        if bytes.len() < HEADER {
            return Err(Malformed::Size(bytes.len()));
        }
        let told = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
        if !(HEADER..=LONGEST_PACKET).contains(&told) {
            return Err(Malformed::Size(told));
        }
        let Some(bytes) = bytes.get(..told) else {
            return Err(Malformed::Length { told, there: bytes.len() });
        };
        let mut at = HEADER;
        while at < bytes.len() {
            let length = bytes.get(at + 1).map_or(0, |length| usize::from(*length));
            if length < 2 || at + length > bytes.len() {
                return Err(Malformed::Attribute(at));
            }
            at += length;
        }
        Ok(Self { bytes })
    }

    pub(crate) const fn code(&self) -> u8 {
        self.bytes[0]
    }

    pub(crate) const fn id(&self) -> u8 {
        self.bytes[1]
    }

    pub(crate) fn authenticator(&self) -> [u8; 16] {
        let mut authenticator = [0; 16];
        authenticator.copy_from_slice(&self.bytes[AUTHENTICATOR]);
        authenticator
    }

    pub(crate) fn attributes(&self) -> impl Iterator<Item = Attribute<'p>> + use<'p> {
        attributes(&self.bytes[HEADER..])
    }

    /// The first attribute of a kind that holds anything.
    pub(crate) fn find(&self, kind: u8) -> Option<&'p [u8]> {
        self.all(kind).find(|value| !value.is_empty())
    }

    pub(crate) fn all(&self, kind: u8) -> impl Iterator<Item = &'p [u8]> + use<'p> {
        self.attributes().filter(move |attribute| attribute.kind == kind).map(|attribute| attribute.value)
    }

    /// The first attribute of a kind that a vendor gave out (RFC 2865, section 5.26); one that can't be read as
    /// the vendor's attributes holds none.
    pub(crate) fn find_vendor(&self, vendor: u32, kind: u8) -> Option<&'p [u8]> {
        self.all(VENDOR_SPECIFIC)
            .filter_map(|value| value.split_first_chunk::<4>())
            .filter(|(id, _)| u32::from_be_bytes(**id) == vendor)
            .flat_map(|(_, rest)| attributes(rest))
            .find(|attribute| attribute.kind == kind)
            .map(|attribute| attribute.value)
    }

    /// Whether who sent this request knows the secret, and nothing was changed on its way: by the Request
    /// Authenticator of accounting (RFC 2866, section 3) and, where there is one, the Message-Authenticator; of
    /// other requests only the latter tells anything.
    pub(crate) fn is_authentic(&self, secret: &Secret) -> bool {
        let mut blank = self.bytes.to_vec();
        if self.code() == ACCOUNTING_REQUEST {
            blank[AUTHENTICATOR].fill(0);
            if !bool::from(self.authenticator().ct_eq(&digest(&[&blank, secret.bytes()]))) {
                return false;
            }
        }
        let Some(place) = self.message_authenticator() else { return self.code() == ACCOUNTING_REQUEST };
        let Some(told) = self.bytes.get(place.clone()).filter(|told| told.len() == 16) else { return false };
        blank[place].fill(0);
        sign(&blank, secret).verify_slice(told).is_ok()
    }

    /// The Accounting-Response to this request: with its Proxy-States, and with a Message-Authenticator where it
    /// has one.
    pub(crate) fn answer(&self, secret: &Secret) -> Vec<u8> {
        let mut answer = vec![ACCOUNTING_RESPONSE, self.id(), 0, 0];
        answer.extend(self.authenticator());
        let signed = self.message_authenticator().is_some();
        if signed {
            answer.extend([MESSAGE_AUTHENTICATOR, 18]);
            answer.extend([0; 16]);
        }
        for state in self.all(PROXY_STATE) {
            // As long as it was, it fits.
            answer.extend([PROXY_STATE, state.len() as u8 + 2]);
            answer.extend(state);
        }
        let length = answer.len() as u16;
        answer[2..4].copy_from_slice(&length.to_be_bytes());
        if signed {
            let code = sign(&answer, secret).finalize().into_bytes();
            answer[HEADER + 2..HEADER + 18].copy_from_slice(&code);
        }
        let authenticator = digest(&[&answer, secret.bytes()]);
        answer[AUTHENTICATOR].copy_from_slice(&authenticator);
        answer
    }

    /// Where the value of the Message-Authenticator stands.
    fn message_authenticator(&self) -> Option<std::ops::Range<usize>> {
        let mut at = HEADER;
        for attribute in self.attributes() {
            let value = at + 2..at + 2 + attribute.value.len();
            at = value.end;
            if attribute.kind == MESSAGE_AUTHENTICATOR {
                return Some(value);
            }
        }
        None
    }
}

/// Attributes one behind the other; ends at one that does not end inside.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    std::iter::from_fn(move || {
        let [kind, length, ..] = *rest else { return None };
        let (attribute, behind) = rest.split_at_checked(usize::from(length).max(2))?;
        rest = behind;
        Some(Attribute { kind, value: attribute.get(2..).filter(|_| length >= 2)? })
    })
}

fn digest(parts: &[&[u8]]) -> [u8; 16] {
    let mut md5 = Md5::new();
    for part in parts {
        md5.update(part);
    }
    md5.finalize().into()
}

fn sign(bytes: &[u8], secret: &Secret) -> Hmac<Md5> {
    let mut hmac = Hmac::<Md5>::new_from_slice(secret.bytes()).expect("HMAC takes a key of any length");
    hmac.update(bytes);
    hmac
}

/// Makes packets, as a NAS does.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// An Accounting-Request of these attributes, signed.
    pub(crate) fn request(id: u8, attributes: &[(u8, Vec<u8>)], secret: &Secret) -> Vec<u8> {
        packet(ACCOUNTING_REQUEST, id, attributes, secret)
    }

    /// With an attribute of kind 80 its value is filled in.
    pub(crate) fn packet(code: u8, id: u8, attributes: &[(u8, Vec<u8>)], secret: &Secret) -> Vec<u8> {
        let mut packet = vec![code, id, 0, 0];
        packet.extend([if code == ACCOUNTING_REQUEST { 0 } else { 7 }; 16]);
        let mut place = None;
        for (kind, value) in attributes {
            packet.extend([*kind, value.len() as u8 + 2]);
            if *kind == MESSAGE_AUTHENTICATOR {
                place = Some(packet.len()..packet.len() + 16);
            }
            packet.extend(value);
        }
        let length = packet.len() as u16;
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        if let Some(place) = place {
            let code = sign(&packet, secret).finalize().into_bytes();
            packet[place].copy_from_slice(&code);
        }
        if code == ACCOUNTING_REQUEST {
            let authenticator = digest(&[&packet, secret.bytes()]);
            packet[AUTHENTICATOR].copy_from_slice(&authenticator);
        }
        packet
    }

    /// A vendor's attribute, to be put into a packet.
    pub(crate) fn vendor(vendor: u32, kind: u8, value: &[u8]) -> (u8, Vec<u8>) {
        let mut bytes = vendor.to_be_bytes().to_vec();
        bytes.extend([kind, value.len() as u8 + 2]);
        bytes.extend(value);
        (VENDOR_SPECIFIC, bytes)
    }

    /// Whether an answer is right to a request: what a NAS checks.
    pub(crate) fn is_answer(answer: &[u8], request: &[u8], secret: &Secret) -> bool {
        let mut unsigned = answer.to_vec();
        unsigned[AUTHENTICATOR].copy_from_slice(&request[AUTHENTICATOR]);
        answer[0] == ACCOUNTING_RESPONSE
            && answer[1] == request[1]
            && answer[AUTHENTICATOR] == digest(&[&unsigned, secret.bytes()])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::testing::{is_answer, packet, request, vendor};
    use super::*;

    fn secret() -> Secret {
        Secret::from("xyzzy5461".to_owned())
    }

    /// Also against the real radclient: tests/tests/radius.rs.
    #[test]
    fn an_authenticator_is_the_md5_of_the_packet_and_the_secret() {
        let bytes = request(7, &[(1, b"nemo".to_vec()), (40, vec![0, 0, 0, 1])], &secret());
        assert_eq!(&bytes[..4], [4, 7, 0, 32]);
        let parsed = Packet::parse(&bytes).expect("a packet");
        assert!(parsed.is_authentic(&secret()));
        assert!(!parsed.is_authentic(&Secret::from("xyzzy5462".to_owned())));
        assert_eq!((parsed.find(1), parsed.find(40)), (Some(&b"nemo"[..]), Some(&[0, 0, 0, 1][..])));
        assert_eq!(parsed.find(2), None);
    }

    #[test]
    fn a_message_authenticator_is_checked_where_there_is_one() {
        let mut bytes = request(1, &[(1, b"nemo".to_vec()), (80, vec![0; 16])], &secret());
        assert!(Packet::parse(&bytes).expect("a packet").is_authentic(&secret()));
        // Signed anew around a wrong one.
        bytes[HEADER + 8] ^= 1;
        bytes[AUTHENTICATOR].fill(0);
        let authenticator = digest(&[&bytes, secret().bytes()]);
        bytes[AUTHENTICATOR].copy_from_slice(&authenticator);
        assert!(!Packet::parse(&bytes).expect("a packet").is_authentic(&secret()));
        for length in [0, 15, 17] {
            let short = request(1, &[(81, vec![0; length])], &secret());
            let mut short = short;
            short[HEADER] = 80;
            short[AUTHENTICATOR].fill(0);
            let authenticator = digest(&[&short, secret().bytes()]);
            short[AUTHENTICATOR].copy_from_slice(&authenticator);
            assert!(!Packet::parse(&short).expect("a packet").is_authentic(&secret()), "{length} bytes");
        }
    }

    #[test]
    fn a_question_for_life_needs_a_message_authenticator() {
        let bare = packet(STATUS_SERVER, 1, &[], &secret());
        assert!(!Packet::parse(&bare).expect("a packet").is_authentic(&secret()));
        let signed = packet(STATUS_SERVER, 1, &[(80, vec![0; 16])], &secret());
        assert!(Packet::parse(&signed).expect("a packet").is_authentic(&secret()));
    }

    #[test]
    fn an_answer_has_the_proxies_states_in_their_order() {
        let states =
            [(33, b"outer".to_vec()), (1, b"nemo".to_vec()), (33, Vec::new()), (33, b"inner".to_vec())];
        let bytes = request(9, &states, &secret());
        let answer = Packet::parse(&bytes).expect("a packet").answer(&secret());
        assert!(is_answer(&answer, &bytes, &secret()));
        let read: Vec<_> = Packet::parse(&answer).expect("a packet").attributes().collect();
        let values: Vec<_> = read.iter().map(|attribute| (attribute.kind, attribute.value)).collect();
        assert_eq!(values, [(33, &b"outer"[..]), (33, b""), (33, b"inner")]);
    }

    #[test]
    fn an_answer_is_signed_as_the_request_was() {
        let bytes = request(9, &[(80, vec![0; 16])], &secret());
        let answer = Packet::parse(&bytes).expect("a packet").answer(&secret());
        assert!(is_answer(&answer, &bytes, &secret()));
        let mut unsigned = answer.clone();
        unsigned[AUTHENTICATOR].copy_from_slice(&bytes[AUTHENTICATOR]);
        unsigned[HEADER + 2..HEADER + 18].fill(0);
        assert!(sign(&unsigned, &secret()).verify_slice(&answer[HEADER + 2..HEADER + 18]).is_ok());
    }

    #[test]
    fn lengths_that_cannot_be_are_told() {
        let valid = request(1, &[(1, b"nemo".to_vec())], &secret());
        for (name, change, expected) in [
            ("nothing", Vec::new(), Malformed::Size(0)),
            ("half a header", valid[..19].to_vec(), Malformed::Size(19)),
            ("cut", valid[..25].to_vec(), Malformed::Length { told: 26, there: 25 }),
            ("shorter than a header", [&valid[..2], &[0, 19], &valid[4..]].concat(), Malformed::Size(19)),
            ("longer than may be", [&valid[..2], &[16, 1], &valid[4..]].concat(), Malformed::Size(4_097)),
            ("an attribute of 1", [&valid[..21], &[1], &valid[22..]].concat(), Malformed::Attribute(20)),
            ("an attribute too long", [&valid[..21], &[7], &valid[22..]].concat(), Malformed::Attribute(20)),
            ("half an attribute", [&valid[..21], &[5], &valid[22..]].concat(), Malformed::Attribute(25)),
        ] {
            assert_eq!(Packet::parse(&change).expect_err(name), expected, "{name}");
        }
        let padded = [&valid[..], &[0; 9]].concat();
        assert!(Packet::parse(&padded).expect("padding is no part of it").is_authentic(&secret()));
    }

    #[test]
    fn vendors_attributes_are_found_among_those_of_others() {
        let attributes = [
            vendor(9, 130, &[1, 2, 3, 4]),
            (VENDOR_SPECIFIC, vec![0, 0, 13]),
            (VENDOR_SPECIFIC, vec![0, 0, 13, 233, 130, 9, 1]),
            (VENDOR_SPECIFIC, vec![0, 0, 13, 233, 129, 3, 5, 130, 3, 7]),
        ];
        let bytes = request(1, &attributes, &secret());
        let packet = Packet::parse(&bytes).expect("a packet");
        assert_eq!(packet.find_vendor(3_561, 129), Some(&[5][..]));
        assert_eq!(packet.find_vendor(3_561, 130), Some(&[7][..]));
        assert_eq!(packet.find_vendor(3_561, 131), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(packet) = Packet::parse(&bytes) {
                packet.attributes().count();
                packet.is_authentic(&secret());
                packet.answer(&secret());
            }
        }

        #[test]
        fn nothing_that_was_changed_is_authentic(
            values in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 0..8),
            place in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            let values: Vec<_> = values.into_iter().filter(|(kind, _)| *kind != 80).collect();
            let mut bytes = request(3, &values, &secret());
            prop_assert!(Packet::parse(&bytes).expect("a packet").is_authentic(&secret()));
            let place = place.index(bytes.len());
            bytes[place] ^= flip;
            if let Ok(packet) = Packet::parse(&bytes) && packet.code() == ACCOUNTING_REQUEST {
                prop_assert!(!packet.is_authentic(&secret()), "byte {place}");
            }
        }
    }
}
