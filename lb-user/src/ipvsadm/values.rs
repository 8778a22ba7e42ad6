//! Values of options: numbers, addresses, masks and flags, read as the C library reads them.
//!
//! `' 6'`, `+5` and `007` are numbers; `0x7f000002`, `010.0.0.1` and `1.2` are addresses; `2001:db8::1:80` is an address
//! without a port. People rely on few of these, scripts on more, so all of them are kept.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use super::{complaint::Complaint, names::Names};
use crate::director::model::service_flags;

/// A number as `strtol` takes it, if nothing follows it and it lies in the range.
pub(super) fn number(word: &str, range: RangeInclusive<u32>) -> Option<u32> {
    let digits = word.trim_start_matches(is_space);
    let unsigned = digits.strip_prefix(['+', '-']).unwrap_or(digits);
    let is_number = !unsigned.is_empty() && unsigned.bytes().all(|byte| byte.is_ascii_digit());
    // What does not fit 64 bits fits no range either.
    let number = u32::try_from(digits.parse::<i64>().ok()?).ok()?;
    (is_number && range.contains(&number)).then_some(number)
}

/// A prefix length of IPv6 as `atoi` takes it: what follows the digits is ignored.
pub(super) fn prefix_length(word: &str) -> Option<u32> {
    let digits = word.trim_start_matches(is_space);
    let digits = digits.strip_prefix('+').unwrap_or(digits);
    let end = digits.bytes().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok().filter(|length| (1..=128).contains(length))
}

/// White space of C.
fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t'..='\r')
}

/// An IPv4 address as `inet_aton` takes it: one to four numbers, the last one fills what is left; decimal, octal or
/// hexadecimal; white space ends it.
fn dotted(word: &str) -> Option<Ipv4Addr> {
    let word = &word[..word.find(is_space).unwrap_or(word.len())];
    let mut parts = word.split('.').map(c_number);
    let last = parts.next_back()??;
    let mut address: u32 = 0;
    let mut bits = 32;
    for part in parts {
        bits = u32::checked_sub(bits, 8).filter(|bits| *bits > 0)?;
        address |= u32::from(u8::try_from(part?).ok()?) << bits;
    }
    let rest = u32::try_from(last).ok().filter(|rest| u64::from(*rest) < 1 << bits)?;
    Some(Ipv4Addr::from(address | rest))
}

/// A number without a sign, in one of C's bases.
fn c_number(word: &str) -> Option<u64> {
    if !word.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    let hexadecimal = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X"));
    let (digits, base) = match (hexadecimal, word.strip_prefix('0')) {
        (Some(digits), _) => (digits, 16),
        (None, Some(digits)) if !digits.is_empty() => (digits, 8),
        _ => (word, 10),
    };
    if digits.starts_with('+') { None } else { u64::from_str_radix(digits, base).ok() }
}

/// An IPv4 address, in digits or as the name of a host.
pub(super) fn host(word: &str, names: &Names) -> Option<Ipv4Addr> {
    dotted(word).or_else(|| names.host(word))
}

/// An address, and the port if one was written: `ADDRESS`, `ADDRESS:PORT`, `[IPV6]:PORT`. The names of ports are known
/// for a protocol only.
pub(super) fn endpoint(word: &str, protocol: Option<&str>, names: &Names) -> Option<(IpAddr, Option<u16>)> {
    if word.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (inside, bracketed_port) = match word.strip_prefix('[') {
        Some(rest) => {
            let (inside, behind) = rest.split_once(']')?;
            (inside, Some(behind.strip_prefix(':').filter(|port| !port.is_empty())?))
        }
        None => (word, None),
    };
    let port_number = |port: &str| {
        let number = number(port, 0..=65535).map(|port| port as u16);
        number.or_else(|| names.port(port, protocol?))
    };
    if let Ok(address) = inside.parse::<Ipv6Addr>() {
        let port = match bracketed_port {
            Some(port) => Some(port_number(port)?),
            None => None,
        };
        return Some((IpAddr::V6(address), port));
    }
    // The brackets have swallowed a port already; the original does not miss it, and so `[192.0.2.1]:80` has none.
    let (address, port) = match inside.rsplit_once(':') {
        Some((address, port)) => (address, Some(port)),
        None => (inside, None),
    };
    let address = host(address, names)?;
    let port = match port {
        Some(port) => Some(port_number(port)?),
        None => None,
    };
    Some((IpAddr::V4(address), port))
}

/// Scheduler flags: name, bit, and the only scheduler that they are for. Listings take the first name that fits.
static FLAGS: [(&str, u8, Option<&str>); 7] = [
    ("sh-fallback", service_flags::FLAG_1, Some("sh")),
    ("sh-port", service_flags::FLAG_2, Some("sh")),
    ("mh-fallback", service_flags::FLAG_1, Some("mh")),
    ("mh-port", service_flags::FLAG_2, Some("mh")),
    ("flag-1", service_flags::FLAG_1, None),
    ("flag-2", service_flags::FLAG_2, None),
    ("flag-3", service_flags::FLAG_3, None),
];

/// Reads the value of `--sched-flags`.
pub(super) fn scheduler_flags(value: &str, scheduler: &str) -> Result<u8, Complaint> {
    let value = cut(value, 127);
    let invalid = |name: &str| Complaint::Usage(format!("invalid scheduler flag `{name}'"));
    let mut flags = 0;
    let mut names = value.split(',').filter(|name| !name.is_empty()).peekable();
    if names.peek().is_none() && !value.is_empty() {
        return Err(invalid(value));
    }
    for name in names {
        let (_, bit, only) = FLAGS.iter().find(|(known, ..)| *known == name).ok_or_else(|| invalid(name))?;
        if only.is_some_and(|only| only != scheduler) {
            return Err(Complaint::Usage(format!("incompatible scheduler flag `{name}'")));
        }
        flags |= bit;
    }
    Ok(flags)
}

/// The names of scheduler flags, separated by commas. A flag that has no name for this scheduler is left out.
pub(super) fn scheduler_flag_names(flags: u8, scheduler: &str) -> String {
    let own = FLAGS.iter().any(|(.., only)| *only == Some(scheduler)).then_some(scheduler);
    let names = FLAGS.iter().filter(|(_, bit, only)| flags & bit != 0 && *only == own).map(|(name, ..)| *name);
    names.collect::<Vec<_>>().join(",")
}

/// The beginning of a text, at most this many bytes of it.
pub(super) fn cut(text: &str, length: usize) -> &str {
    let end = (0..=length.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_strtol() {
        for (word, wanted) in [
            ("5", Some(5)),
            (" 6", Some(6)),
            ("\t+7", Some(7)),
            ("007", Some(7)),
            ("-0", Some(0)),
            ("-1", None),
            ("101", None),
            ("", None),
            (" ", None),
            ("+", None),
            ("5 ", None),
            ("0x5", None),
            ("1e1", None),
            ("+-5", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(number(word, 0..=100), wanted, "{word:?}");
        }
    }

    #[test]
    fn addresses_are_those_of_inet_aton() {
        for (word, wanted) in [
            ("192.0.2.1", Some([192, 0, 2, 1])),
            ("1.2", Some([1, 0, 0, 2])),
            ("1.2.3", Some([1, 2, 0, 3])),
            ("1.2.65535", Some([1, 2, 255, 255])),
            ("1.2.65536", None),
            ("0x7f000002", Some([127, 0, 0, 2])),
            ("010.0.0.1", Some([8, 0, 0, 1])),
            ("4294967295", Some([255, 255, 255, 255])),
            ("4294967296", None),
            ("0", Some([0, 0, 0, 0])),
            ("192.0.2.9 behind", Some([192, 0, 2, 9])),
            ("192.0.2.256", None),
            ("192.0.2.1.5", None),
            ("09.0.0.1", None),
            ("0x.0.0.1", None),
            ("1.", None),
            ("", None),
            (" 1.2.3.4", None),
            ("1.2.3.4/24", None),
        ] {
            assert_eq!(dotted(word), wanted.map(Ipv4Addr::from), "{word:?}");
        }
    }

    #[test]
    fn brackets_around_ipv4_swallow_the_port() {
        let names = Names::of_test("");
        let address = IpAddr::from([192, 0, 2, 7]);
        assert_eq!(endpoint("[192.0.2.7]:80", Some("tcp"), &names), Some((address, None)));
        assert_eq!(endpoint("192.0.2.7:80", Some("tcp"), &names), Some((address, Some(80))));
    }

    #[test]
    fn flags_keep_to_their_scheduler() {
        assert_eq!(scheduler_flags("sh-port,,flag-1", "sh"), Ok(3));
        assert_eq!(scheduler_flags("", "sh"), Ok(0));
        assert!(scheduler_flags(",", "sh").is_err());
        assert!(scheduler_flags("sh-port", "mh").is_err());
        assert_eq!(scheduler_flag_names(7, "sh"), "sh-fallback,sh-port");
        assert_eq!(scheduler_flag_names(7, "rr"), "flag-1,flag-2,flag-3");
        assert_eq!(scheduler_flag_names(4, "mh"), "");
    }
}
