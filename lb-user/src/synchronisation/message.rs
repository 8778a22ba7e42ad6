//! The messages: IPVS's synchronisation protocol, version 1. All numbers are in network order.
//!
//! ```text
//! message   0 | sync id | length (16) | entries | 1 | 0 (16)       8 bytes, then the entries
//! entry     type | protocol | version, length (4, 12) | flags (32) | state (16) | client's, virtual, server's port (16 each) |
//!           mark (32) | timeout in seconds (32) | client's, virtual, server's address (32 or 128 each) | options
//! option    type | length | data
//! ```
//!
//! The length is that of the whole datagram. Each entry begins at a multiple of four bytes. Of its options none means anything to
//! bpfvs: sequence numbers that FTP shifts, and what a persistence engine found. An entry that has them is refused, because
//! its connection could not be gone on with.
//!
//! Nothing in a datagram is believed: [`read`] gives entries as far as it is in order, and [`Fault`]s.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bits of [`Entry::flags`].
pub mod flags {
    /// The part that says how packets are forwarded.
    #[doc(alias = "IP_VS_CONN_F_FWD_MASK")]
    pub const METHOD: u32 = 0x7;
    /// NAT.
    pub const MASQUERADE: u32 = 0;
    /// A tunnel.
    pub const TUNNEL: u32 = 2;
    /// Direct routing.
    pub const ROUTE: u32 = 3;
    /// Not a packet of the other direction was seen.
    pub const NO_OUTPUT: u32 = 0x80;
    /// Counted among the inactive connections of its real server.
    pub const INACTIVE: u32 = 0x100;
    /// FTP has shifted sequence numbers of one direction or the other.
    pub const SEQUENCE: u32 = 0x600;
    /// A connection whose client's port is not known yet.
    pub const NO_CLIENT_PORT: u32 = 0x800;
    /// A template of a persistent service.
    pub const TEMPLATE: u32 = 0x1000;
    /// One packet was scheduled by itself.
    pub const ONE_PACKET: u32 = 0x2000;
}

/// What one director tells of a connection or a template.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Entry {
    /// The IP protocol; 0 for the template of a mark.
    pub protocol: u8,
    /// Bits of [`flags`].
    pub flags: u32,
    /// State of the protocol, by IPVS's number; of a template, 1 if it is assured.
    pub state: u16,
    /// The client; of a template, its network and port 0.
    pub client: SocketAddr,
    /// Virtual address and port. Of a mark's template, the mark in the place of the address.
    pub vip: SocketAddr,
    /// The real server.
    pub server: SocketAddr,
    /// The firewall mark of the service; 0 for none.
    pub mark: u32,
    /// Seconds until it is over; 0 if that is not said.
    pub timeout: u32,
}

impl Entry {
    /// Whether it is a template.
    pub const fn is_template(&self) -> bool {
        self.flags & flags::TEMPLATE != 0
    }

    /// Whether a message can say it: all addresses are of one family.
    pub const fn is_expressible(&self) -> bool {
        self.client.is_ipv4() == self.vip.is_ipv4() && self.vip.is_ipv4() == self.server.is_ipv4()
    }
}

/// Bytes before the first entry.
const HEADER: usize = 8;
/// The version of the protocol.
const VERSION: u8 = 1;
/// Bit of an entry's type: its addresses are IPv6.
const IPV6: u8 = 1;
/// Bytes of an entry before its addresses.
const FIXED: usize = 24;
/// The bits of an entry's length; its version is above them.
const LENGTH: u16 = 0xfff;
/// Bit of an option's type: who does not know it may leave it out.
const DISPENSABLE: u8 = 0x40;

/// What is wrong with a message, or with one of its entries.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Fault {
    /// Its parts do not add up.
    #[error("it is damaged")]
    Malformed,
    /// It is of another version, such as that of kernels before Linux 2.6.39.
    #[error("it is of another version")]
    Version,
    /// It says of a connection what bpfvs cannot go on with.
    #[error("it has a part that bpfvs does not understand")]
    Unsupported,
}

impl Fault {
    /// Whether what follows in the message cannot be trusted either.
    const fn is_the_end(self) -> bool {
        !matches!(self, Self::Unsupported)
    }
}

/// A message that was received.
#[derive(Clone, Debug)]
pub struct Message<'a> {
    /// Who may hear it.
    pub sync_id: u8,
    entries: u8,
    rest: &'a [u8],
}

/// Reads the beginning of a message. Its entries come by iteration, up to the first that is damaged.
pub fn read(datagram: &[u8]) -> Result<Message<'_>, Fault> {
    let (&[zero, sync_id, high, low], rest) = datagram.split_first_chunk().ok_or(Fault::Malformed)?;
    if usize::from(u16::from_be_bytes([high, low])) != datagram.len() {
        return Err(Fault::Malformed);
    }
    match (zero, rest.split_first_chunk()) {
        (0, Some((&[entries, VERSION, 0, 0], rest))) => Ok(Message { sync_id, entries, rest }),
        _ => Err(Fault::Version),
    }
}

impl Iterator for Message<'_> {
    type Item = Result<Entry, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        self.entries = self.entries.checked_sub(1)?;
        let entry = self.entry();
        if let Err(fault) = entry
            && fault.is_the_end()
        {
            self.entries = 0;
        }
        Some(entry)
    }
}

impl Message<'_> {
    fn entry(&mut self) -> Result<Entry, Fault> {
        let mut fixed = Reader(self.rest);
        let (kind, protocol, length) = (fixed.u8()?, fixed.u8()?, fixed.u16()?);
        if length & !LENGTH != 0 {
            return Err(Fault::Version);
        }
        let length = usize::from(length & LENGTH);
        let entry = read_entry(kind, protocol, self.rest.get(4..length).ok_or(Fault::Malformed)?);
        // The last one is not padded.
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        entry
    }
}

fn read_entry(kind: u8, protocol: u8, bytes: &[u8]) -> Result<Entry, Fault> {
    let mut reader = Reader(bytes);
    let (flags, state) = (reader.u32()?, reader.u16()?);
    let [client_port, virtual_port, server_port] = [reader.u16()?, reader.u16()?, reader.u16()?];
    let (mark, timeout) = (reader.u32()?, reader.u32()?);
    let mut address = || match kind {
        0 => Ok(IpAddr::V4(Ipv4Addr::from(reader.take::<4>()?))),
        IPV6 => Ok(IpAddr::V6(Ipv6Addr::from(reader.take::<16>()?))),
        _ => Err(Fault::Malformed),
    };
    let [client, vip, server] = [address()?, address()?, address()?];
    let mut has_options = false;
    while !reader.0.is_empty() {
        let (option, length) = (reader.u8()?, reader.u8()?);
        reader.0 = reader.0.get(length.max(1).into()..).filter(|_| length > 0).ok_or(Fault::Malformed)?;
        has_options |= option & DISPENSABLE == 0;
    }
    if has_options || flags & (flags::SEQUENCE | flags::NO_CLIENT_PORT | flags::ONE_PACKET) != 0 {
        return Err(Fault::Unsupported);
    }
    Ok(Entry {
        protocol,
        flags,
        state,
        client: SocketAddr::new(client, client_port),
        vip: SocketAddr::new(vip, virtual_port),
        server: SocketAddr::new(server, server_port),
        mark,
        timeout,
    })
}

/// Takes numbers from the front of some bytes.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Fault::Malformed)?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn u8(&mut self) -> Result<u8, Fault> {
        self.take().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, Fault> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.take().map(u32::from_be_bytes)
    }
}

/// Puts entries into messages, as many as fit.
#[derive(Debug)]
pub struct Writer {
    sync_id: u8,
    limit: usize,
    entries: u8,
    bytes: Vec<u8>,
}

impl Writer {
    /// For messages of at most so many bytes; one entry alone may have more.
    pub fn new(sync_id: u8, limit: u16) -> Self {
        Self { sync_id, limit: limit.into(), entries: 0, bytes: vec![0; HEADER] }
    }

    /// Adds an entry that can be expressed. If it does not fit any more, the answer is the message before it.
    pub fn add(&mut self, entry: &Entry) -> Option<Vec<u8>> {
        let length = FIXED + if entry.vip.is_ipv4() { 12 } else { 48 };
        let is_full = self.bytes.len() + length > self.limit || self.entries == u8::MAX;
        let full = if is_full { self.finish() } else { None };
        self.entries += 1;
        self.bytes.extend([if entry.vip.is_ipv4() { 0 } else { IPV6 }, entry.protocol]);
        self.bytes.extend((length as u16).to_be_bytes());
        self.bytes.extend(entry.flags.to_be_bytes());
        for number in [entry.state, entry.client.port(), entry.vip.port(), entry.server.port()] {
            self.bytes.extend(number.to_be_bytes());
        }
        self.bytes.extend(entry.mark.to_be_bytes());
        self.bytes.extend(entry.timeout.to_be_bytes());
        for address in [entry.client.ip(), entry.vip.ip(), entry.server.ip()] {
            match address {
                IpAddr::V4(address) => self.bytes.extend(address.octets()),
                IpAddr::V6(address) => self.bytes.extend(address.octets()),
            }
        }
        full
    }

    /// The message with what was added since the last one; nothing if nothing was.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        let entries = std::mem::take(&mut self.entries);
        if entries == 0 {
            return None;
        }
        let mut message = std::mem::replace(&mut self.bytes, vec![0; HEADER]);
        let [high, low] = (message.len() as u16).to_be_bytes();
        message[..HEADER].copy_from_slice(&[0, self.sync_id, high, low, entries, VERSION, 0, 0]);
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(hexadecimal: &str) -> Vec<u8> {
        let digits: Vec<u8> = hexadecimal.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).expect("digits are text"), 16).expect("two digits");
        digits.chunks(2).map(byte).collect()
    }

    fn entries(datagram: &[u8]) -> Vec<Result<Entry, Fault>> {
        read(datagram).expect("it begins well").collect()
    }

    /// Messages that the kernel has sent.
    const CAPTURED: [&str; 6] = [
        "0021002c 01010000 00060024 00000000 0001 03e8 0050 1f90 00000000 00000384 0a090002 0a630001 0a010001",
        "0021002c 01010000 00060024 00000100 0007 03e8 0050 1f90 00000000 0000003c 0a090002 0a630001 0a010001",
        "0021002c 01010000 00110024 00000183 0000 07d0 0035 0035 00000000 0000012c 0a090002 0a630001 0a010001",
        "0021002c 01010000 00060024 00001100 0001 0000 0050 1f90 00000000 0000012c 0a090002 0a630001 0a010001",
        "00210050 01010000 01060048 00000083 0001 03ea 0050 0050 00000000 00000384 fd090000000000000000000000000002 \
         fd990000000000000000000000000001 fd010000000000000000000000000001",
        "00210098 04010000 00060024 00001100 0000 0000 0050 1f90 00000000 0000012c 0a090002 0a630001 0a010001 \
         00060024 00001100 0001 0000 0050 1f90 00000000 0000012c 0a090002 0a630001 0a010001 \
         00060024 00000000 0001 03e9 0050 1f90 00000000 00000384 0a090002 0a630001 0a010001 \
         00060024 00001100 0001 0000 0050 1f90 00000000 0000012c 0a090002 0a630001 0a010001",
    ];

    #[test]
    fn the_kernels_messages_are_understood() {
        let read = entries(&bytes(CAPTURED[0]));
        let entry = Entry {
            protocol: 6,
            flags: 0,
            state: 1,
            client: "10.9.0.2:1000".parse().expect("an address"),
            vip: "10.99.0.1:80".parse().expect("an address"),
            server: "10.1.0.1:8080".parse().expect("an address"),
            mark: 0,
            timeout: 900,
        };
        assert_eq!(read, [Ok(entry)]);
        assert_eq!(entries(&bytes(CAPTURED[2]))[0].map(|entry| (entry.protocol, entry.flags)), Ok((17, 0x183)));
        assert_eq!(entries(&bytes(CAPTURED[4]))[0].map(|entry| entry.server), Ok("[fd01::1]:80".parse().expect("an address")));
        let four = entries(&bytes(CAPTURED[5]));
        assert_eq!(
            four.iter().map(|entry| entry.map(|entry| entry.is_template())).collect::<Vec<_>>(),
            [true, true, false, true].map(Ok)
        );
    }

    #[test]
    fn messages_are_written_as_the_kernel_does() {
        for captured in CAPTURED {
            let mut writer = Writer::new(33, 1472);
            for entry in entries(&bytes(captured)) {
                assert_eq!(writer.add(&entry.expect("it is whole")), None);
            }
            assert_eq!(writer.finish(), Some(bytes(captured)));
            assert_eq!(writer.finish(), None);
        }
    }

    #[test]
    fn full_messages_are_sent_before_the_next_entry() {
        let entry = entries(&bytes(CAPTURED[0]))[0].expect("it is whole");
        // One entry alone may be larger than the limit.
        for (limit, most) in [(1, 1), (80, 2), (1472, 40), (65507, 255)] {
            let mut writer = Writer::new(1, limit);
            let mut messages: Vec<_> = (0..600).filter_map(|_| writer.add(&entry)).collect();
            messages.extend(writer.finish());
            let counts: Vec<_> = messages.iter().map(|message| entries(message).len()).collect();
            assert_eq!((counts[0], counts.iter().sum::<usize>()), (most, 600), "{limit}");
            assert!(messages.iter().all(|message| message.len() <= usize::from(limit).max(HEADER + 36)));
        }
    }

    /// An entry with these options behind it, and a whole one after it.
    fn with_options(options: &str) -> Vec<Result<Entry, Fault>> {
        let options = bytes(options);
        let mut message = bytes(CAPTURED[0]);
        message[HEADER + 3] += options.len() as u8;
        message.extend(&options);
        message.resize(message.len().next_multiple_of(4), 0);
        message.extend_from_within(HEADER..HEADER + 36);
        let last = message.len() - 36;
        message[last + 3] = 36;
        message[4] = 2;
        message[3] = message.len() as u8;
        entries(&message)
    }

    #[test]
    fn options_are_walked_through() {
        let whole = entries(&bytes(CAPTURED[0]))[0];
        assert_eq!(with_options("4a 03 000000"), [whole, whole]);
        // Sequence numbers, an engine's data with its name, something new.
        let sequence = format!("01 18 {}", "00".repeat(24));
        for options in [sequence.as_str(), "02 03 616263 03 03 736970", "0a 01 00"] {
            assert_eq!(with_options(options), [Err(Fault::Unsupported), whole], "{options}");
        }
        for options in ["4a", "4a 00", "4a 05 00"] {
            assert_eq!(with_options(options), [Err(Fault::Malformed)], "{options}");
        }
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let whole = bytes(CAPTURED[5]);
        for length in 0..whole.len() {
            assert_eq!(read(&whole[..length]).err(), Some(Fault::Malformed), "{length}");
        }
        let changed = |place: usize, value: u8| {
            let mut message = whole.clone();
            message[place] = value;
            read(&message).map(Iterator::collect::<Vec<_>>)
        };
        // Version 0 has the number of entries in its first byte.
        assert_eq!(changed(0, 4), Err(Fault::Version));
        assert_eq!(changed(5, 2), Err(Fault::Version));
        assert_eq!(changed(7, 1), Err(Fault::Version));
        // The second entry: an unknown type, another version, one that is too short, one that is too long.
        for (place, value) in [(44, 2), (46, 0x10), (47, 35), (47, 0), (46, 0xf)] {
            let entries = changed(place, value).expect("it begins well");
            assert!(entries.len() == 2 && entries[0].is_ok() && entries[1].is_err(), "{place} {value}: {entries:?}");
        }
        // More entries than there are.
        assert_eq!(changed(4, 5).expect("it begins well").last(), Some(&Err(Fault::Malformed)));
    }

    proptest! {
        /// Whatever comes from the network: no panic, no more entries than bytes for them.
        #[test]
        fn nothing_that_is_received_does_harm(datagram in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(message) = read(&datagram) {
                prop_assert!(message.flatten().count() <= datagram.len() / 36);
            }
        }

        /// The same with messages that begin well.
        #[test]
        fn nothing_within_a_message_does_harm(
            captured in 0..CAPTURED.len(),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            tail in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut datagram = bytes(CAPTURED[captured]);
            datagram.extend(tail);
            for (place, value) in changes {
                let place = place.index(datagram.len());
                datagram[place] = value;
            }
            datagram[..HEADER].copy_from_slice(&[0, 33, 0, 0, 9, 1, 0, 0]);
            let length = datagram.len() as u16;
            datagram[2..4].copy_from_slice(&length.to_be_bytes());
            let entries: Vec<_> = read(&datagram).expect("it begins well").collect();
            prop_assert!(entries.iter().filter(|entry| entry.is_ok()).count() <= datagram.len() / 36);
        }
    }
}
