//! Why a packet left the datapath without being forwarded, or without being tracked: one counter for each reason.

/// Defines the reasons, their names for people and machines, and their number, in one list.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $fate:ident, $text:literal;)+) => {
        /// Why a packet was passed on to the kernel's own stack, dropped, or answered. In alphabetical order.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        #[repr(u32)]
        pub enum Reason { $($(#[doc = $doc])+ $variant),+ }

        impl Reason {
            /// Every reason, in the order of their numbers, which is the order in the counter array.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// A short name for metrics and JSON.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// What became of the packet.
            #[inline(always)]
            pub const fn fate(self) -> Fate {
                match self { $(Self::$variant => Fate::$fate),+ }
            }

            /// The reason in words, for people.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

/// What became of a packet that was not forwarded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fate {
    /// It was turned into an ICMP error and sent back.
    Answered,
    /// It was dropped.
    Dropped,
    /// It was forwarded all the same: the counter tells what was missing.
    Forwarded,
    /// The kernel's own stack has it, unchanged.
    Passed,
}

reasons! {
    /// An ICMP error was due, but this CPU has sent its share for this second.
    AnswerLimit = "answer-limit", Dropped, "an ICMP error was due, but too many were sent this second";
    /// The packet could not be changed as needed: a helper of the kernel refused.
    Failed = "failed", Dropped, "the kernel could not make room for headers, or did not let them be changed";
    /// A later fragment whose first fragment was not ours, or not seen: the kernel may have the first.
    FragmentUnknown = "fragment-unknown", Passed, "a later fragment of a packet whose first fragment was not ours, or not seen";
    /// Every local port that was tried for a new FULLNAT connection is taken.
    LocalPorts = "local-ports", Dropped, "no local address has a free port for another FULLNAT connection to the real server";
    /// The chosen real server is the director itself.
    LocalServer = "local-server", Passed, "the real server is the director itself";
    /// A header is cut off or contradicts itself.
    Malformed = "malformed", Passed, "a header is cut off or contradicts itself";
    /// The service keeps calls together (`--pe sip`), and the packet that would begin a connection names none.
    NoCallId = "no-call-id", Dropped, "to a service with `--pe sip`, but no SIP message with a Call-ID";
    /// A TCP or SCTP packet that begins nothing and belongs to nothing.
    NoConnection = "no-connection", Passed, "to a service, but neither of a connection nor the start of one";
    /// There is no route to the real server.
    NoRoute = "no-route", Answered, "there is no route to the real server";
    /// No real server takes new connections.
    NoServer = "no-server", Answered, "no real server of the service takes new connections";
    /// The virtual address has no service on this protocol and port.
    NoService = "no-service", Passed, "the virtual address has no service on this protocol and port";
    /// The kernel knows no way to the client, or does not forward.
    NoWayBack = "no-way-back", Passed, "a real server's reply, to whose client the kernel knows no way, or forwards nothing";
    /// Neither IPv4 nor IPv6, or to nobody in particular (broadcast, multicast).
    NotIp = "not-ip", Passed, "neither IPv4 nor IPv6";
    /// The destination is not a virtual address.
    NotOurs = "not-ours", Passed, "the destination is not a virtual address";
    /// To a virtual address, but neither TCP, UDP, SCTP nor an ICMP error.
    NotTransport = "not-transport", Passed, "to a virtual address, but neither TCP, UDP, SCTP nor an ICMP error";
    /// XDP left it to tc, because the real server's device takes no frames from XDP.
    OtherDevice = "other-device", Passed, "left to tc: the real server's device takes no frames from XDP";
    /// The connection's real server was removed.
    ServerRemoved = "server-removed", Dropped, "the connection's real server was removed from its service";
    /// The first part of an SCTP packet whose port is to be changed: its checksum is over parts that are not here.
    SctpFragment = "sctp-fragment", Dropped, "a fragmented SCTP packet, to a masqueraded real server on another port";
    /// It was forwarded without a connection, by the addresses and ports alone: see [`crate::flood`].
    Stateless = "stateless", Forwarded, "forwarded without a connection, for lack of room: flood mode";
    /// The connection table or that of templates is full.
    TableFull = "table-full", Dropped, "the connection table or that of templates is full";
    /// A client's template was about to be deleted; its next packet finds none, and makes a new one.
    TemplateOver = "template-over", Dropped, "the client's template was being deleted at that moment";
    /// Larger than the way to the real server, or to its client, allows.
    TooBig = "too-big", Answered, "larger than the way to the real server allows";
    /// The time to live ended here.
    TtlExpired = "ttl-expired", Answered, "the time to live ended here";
    /// The firewall has still to say whether the packet has a mark: see [`crate::mark`].
    Unmarked = "unmarked", Passed, "left to the firewall: a new connection, which it may give the mark of another service";
    /// The real server has still to be told who the client is, and the packet has no room for it.
    Unnamed = "unnamed", Dropped, "no room for the client's address, which the FULLNAT server has still to be told";
    /// XDP left it to tc, because only the kernel's neighbour code can send it now.
    Unresolved = "unresolved", Passed, "left to tc: the real server's MAC address is not known yet";
    /// A client of IPv6 and a real server of IPv4: this packet cannot be told in the other version.
    Untold = "untold", Dropped, "between IPv6 and IPv4: a fragment, or something else that has no counterpart in the other";
    /// XDP left it to tc or to the VLAN's own device.
    Vlan = "vlan", Passed, "left to tc: the VLAN tag has to be changed";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions() {
        for (position, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, position);
        }
    }
}
