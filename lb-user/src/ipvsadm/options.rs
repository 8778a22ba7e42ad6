//! Every option of ipvsadm in one table: how it is typed, what it is called in messages, and which command takes it.
//!
//! The original keeps these three in three places. Here the reader of the command line ([`super::reader`]), the check of
//! combinations ([`check`]) and all messages read the same rows. A row has one column per command:
//!
//! ```text
//! + required   o optional   - forbidden   1 at most one of the options with this sign
//! ```
//!
//! The rows stand in the order in which the original looks for faults; the first fault found is the one reported, so the
//! order matters. What an option's value means is not here but in [`super::parse`].

use std::{collections::HashMap, sync::LazyLock};

use super::complaint::Complaint;

/// A command, in the order of the columns of [`OPTIONS`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum CommandName {
    AddService,
    EditService,
    DeleteService,
    Clear,
    List,
    AddServer,
    DeleteServer,
    EditServer,
    Set,
    StartDaemon,
    StopDaemon,
    Restore,
    Save,
    Zero,
}

impl CommandName {
    /// Its name in messages.
    const fn name(self) -> &'static str {
        match self {
            Self::AddService => "add-service",
            Self::EditService => "edit-service",
            Self::DeleteService => "delete-service",
            Self::Clear => "flush",
            Self::List => "list",
            Self::AddServer => "add-server",
            Self::DeleteServer => "delete-server",
            Self::EditServer => "edit-server",
            Self::Set => "set",
            Self::StartDaemon => "start-daemon",
            Self::StopDaemon => "stop-daemon",
            Self::Restore => "restore",
            Self::Save => "save",
            Self::Zero => "zero",
        }
    }
}

/// How many commands there are.
const COMMAND_COUNT: usize = CommandName::Zero as usize + 1;

/// An option, as combinations are checked: the four ways to name a service are one option, and so are the three
/// forwarding methods. In the order of [`OPTIONS`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum OptionName {
    Numeric,
    Connection,
    ServiceAddress,
    Scheduler,
    Persistent,
    Netmask,
    RealServer,
    ForwardingMethod,
    Weight,
    UpperThreshold,
    LowerThreshold,
    McastInterface,
    Timeout,
    Daemon,
    Stats,
    Rate,
    Thresholds,
    PersistentConn,
    NoSort,
    SyncId,
    Exact,
    OnePacket,
    Engine,
    SchedulerFlags,
    McastGroup,
    McastPort,
    McastTtl,
    SyncMaxlen,
    TunnelInfo,
    TunnelType,
    TunnelPort,
    TunnelNoChecksum,
    TunnelChecksum,
    TunnelRemoteChecksum,
    FullNat,
    Toa,
}

/// What a switch means to [`super::parse`]. An option with a single switch needs no more than [`Meaning::Option`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Meaning {
    Command(CommandName),
    Help,
    Version,
    /// The option itself.
    Option,
    TcpService,
    UdpService,
    SctpService,
    MarkService,
    Gatewaying,
    Ipip,
    Masquerading,
    /// `-6`, which may be repeated and so is no option of the table.
    Ipv6,
    /// `--sort`: taken and forgotten.
    Nothing,
}

/// Whether a switch takes an argument.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Argument {
    No,
    Optional,
    Required,
}

/// One way to type an option or a command.
#[derive(Debug)]
pub(super) struct Switch {
    /// The letters that may follow a single dash.
    pub(super) letters: &'static str,
    /// The word that may follow two dashes.
    pub(super) word: &'static str,
    pub(super) argument: Argument,
    pub(super) meaning: Meaning,
}

/// What a command thinks of an option.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Rule {
    Required,
    Optional,
    Forbidden,
    /// At most one of all options that have this rule.
    OneOf,
}

/// One option: a row of the table.
#[derive(Debug)]
pub(super) struct Definition {
    pub(super) option: OptionName,
    /// Its name in messages.
    pub(super) name: &'static str,
    rules: [Rule; COMMAND_COUNT],
    pub(super) switches: &'static [Switch],
}

const fn rules<const N: usize>(signs: &str) -> [Rule; N] {
    let signs = signs.as_bytes();
    assert!(signs.len() == N, "one sign for each column");
    let mut rules = [Rule::Forbidden; N];
    let mut column = 0;
    while column < N {
        rules[column] = match signs[column] {
            b'+' => Rule::Required,
            b'o' => Rule::Optional,
            b'-' => Rule::Forbidden,
            b'1' => Rule::OneOf,
            _ => panic!("a rule is one of + o - 1"),
        };
        column += 1;
    }
    rules
}

const fn row(option: OptionName, name: &'static str, signs: &str, switches: &'static [Switch]) -> Definition {
    Definition { option, name, rules: rules(signs), switches }
}

const fn switch(letters: &'static str, word: &'static str, argument: Argument, meaning: Meaning) -> Switch {
    Switch { letters, word, argument, meaning }
}

/// A switch without an argument that is the whole of its option.
const fn flag(letters: &'static str, word: &'static str) -> Switch {
    switch(letters, word, Argument::No, Meaning::Option)
}

/// A switch with an argument that is the whole of its option.
const fn value(letters: &'static str, word: &'static str) -> Switch {
    switch(letters, word, Argument::Required, Meaning::Option)
}

/// The table.
#[rustfmt::skip]
pub(super) static OPTIONS: [Definition; 36] = [
    //                                                          AEDCLadesSSRSZ  (set, start, stop)
    row(OptionName::Numeric,              "numeric",           "----o-------o-", &[flag("n", "numeric")]),
    row(OptionName::Connection,           "connection",        "----1---------", &[flag("c", "connection")]),
    row(OptionName::ServiceAddress,       "service-address",   "+++-1+++-----o", &[
        switch("t", "tcp-service", Argument::Required, Meaning::TcpService),
        switch("u", "udp-service", Argument::Required, Meaning::UdpService),
        switch("", "sctp-service", Argument::Required, Meaning::SctpService),
        switch("f", "fwmark-service", Argument::Required, Meaning::MarkService),
    ]),
    row(OptionName::Scheduler,            "scheduler",         "oo------------", &[value("s", "scheduler")]),
    row(OptionName::Persistent,           "persistent",        "oo------------", &[
        switch("p", "persistent", Argument::Optional, Meaning::Option),
    ]),
    row(OptionName::Netmask,              "netmask",           "oo------------", &[value("M", "netmask")]),
    row(OptionName::RealServer,           "real-server",       "-----+++------", &[value("r", "real-server")]),
    row(OptionName::ForwardingMethod,     "forwarding-method", "-----o-o------", &[
        switch("g", "gatewaying", Argument::No, Meaning::Gatewaying),
        switch("i", "ipip", Argument::No, Meaning::Ipip),
        switch("m", "masquerading", Argument::No, Meaning::Masquerading),
    ]),
    row(OptionName::Weight,               "weight",            "-----o-o------", &[value("w", "weight")]),
    row(OptionName::UpperThreshold,       "u-threshold",       "-----o-o------", &[value("x", "u-threshold")]),
    row(OptionName::LowerThreshold,       "l-threshold",       "-----o-o------", &[value("y", "l-threshold")]),
    row(OptionName::McastInterface,       "mcast-interface",   "---------o----", &[value("", "mcast-interface")]),
    row(OptionName::Timeout,              "timeout",           "----1---------", &[flag("", "timeout")]),
    row(OptionName::Daemon,               "daemon",            "----1---------", &[flag("", "daemon")]),
    row(OptionName::Stats,                "stats",             "----o---------", &[flag("", "stats")]),
    row(OptionName::Rate,                 "rate",              "----o---------", &[flag("", "rate")]),
    row(OptionName::Thresholds,           "thresholds",        "----o---------", &[flag("", "thresholds")]),
    row(OptionName::PersistentConn,       "persistent-conn",   "----o---------", &[flag("", "persistent-conn")]),
    row(OptionName::NoSort,               "nosort",            "----o---------", &[flag("", "nosort")]),
    row(OptionName::SyncId,               "syncid",            "----o----oo---", &[value("", "syncid")]),
    row(OptionName::Exact,                "exact",             "----o---------", &[flag("X", "exact")]),
    row(OptionName::OnePacket,            "ops",               "oo------------", &[flag("o", "ops")]),
    row(OptionName::Engine,               "pe",                "oo------------", &[value("", "pe")]),
    row(OptionName::SchedulerFlags,       "sched-flags",       "oo------------", &[value("b", "sched-flags")]),
    row(OptionName::McastGroup,           "mcast-group",       "---------o----", &[value("", "mcast-group")]),
    row(OptionName::McastPort,            "mcast-port",        "---------o----", &[value("", "mcast-port")]),
    row(OptionName::McastTtl,             "mcast-ttl",         "---------o----", &[value("", "mcast-ttl")]),
    row(OptionName::SyncMaxlen,           "sync-maxlen",       "---------o----", &[value("", "sync-maxlen")]),
    row(OptionName::TunnelInfo,           "tun-info",          "----o---------", &[flag("", "tun-info")]),
    row(OptionName::TunnelType,           "tun-type",          "-----o-o------", &[value("", "tun-type")]),
    row(OptionName::TunnelPort,           "tun-port",          "-----o-o------", &[value("", "tun-port")]),
    row(OptionName::TunnelNoChecksum,     "tun-nocsum",        "-----o-o------", &[flag("", "tun-nocsum")]),
    row(OptionName::TunnelChecksum,       "tun-csum",          "-----o-o------", &[flag("", "tun-csum")]),
    row(OptionName::TunnelRemoteChecksum, "tun-remcsum",       "-----o-o------", &[flag("", "tun-remcsum")]),
    // Not options of the original's.
    row(OptionName::FullNat,              "fullnat",           "-----o-o------", &[flag("", "fullnat")]),
    row(OptionName::Toa,                  "toa",               "-----o-o------", &[flag("", "toa")]),
];

const fn command(letters: &'static str, word: &'static str, argument: Argument, name: CommandName) -> Switch {
    switch(letters, word, argument, Meaning::Command(name))
}

/// The switches that are no options: the commands, and the two that may be repeated.
#[rustfmt::skip]
pub(super) static COMMANDS: [Switch; 18] = [
    command("A", "add-service",     Argument::No,       CommandName::AddService),
    command("E", "edit-service",    Argument::No,       CommandName::EditService),
    command("D", "delete-service",  Argument::No,       CommandName::DeleteService),
    command("C", "clear",           Argument::No,       CommandName::Clear),
    command("Ll", "list",           Argument::No,       CommandName::List),
    command("a", "add-server",      Argument::No,       CommandName::AddServer),
    command("d", "delete-server",   Argument::No,       CommandName::DeleteServer),
    command("e", "edit-server",     Argument::No,       CommandName::EditServer),
    command("", "set",              Argument::No,       CommandName::Set),
    command("", "start-daemon",     Argument::Required, CommandName::StartDaemon),
    command("", "stop-daemon",      Argument::Required, CommandName::StopDaemon),
    command("R", "restore",         Argument::No,       CommandName::Restore),
    command("S", "save",            Argument::No,       CommandName::Save),
    command("Z", "zero",            Argument::No,       CommandName::Zero),
    switch("h", "help",             Argument::No,       Meaning::Help),
    switch("v", "version",          Argument::No,       Meaning::Version),
    switch("6", "ipv6",             Argument::No,       Meaning::Ipv6),
    switch("", "sort",              Argument::No,       Meaning::Nothing),
];

/// A switch, and the option that it belongs to, if any.
pub(super) type Found = (&'static Switch, Option<&'static Definition>);

/// All switches, by their letters and by their words: a rule file has a hundred thousand of them.
static LETTERS: LazyLock<HashMap<char, Found>> = LazyLock::new(|| {
    let each = |found: Found| found.0.letters.chars().map(move |letter| (letter, found));
    switches().flat_map(each).collect()
});
static WORDS: LazyLock<HashMap<&str, Found>> = LazyLock::new(|| switches().map(|found| (found.0.word, found)).collect());

fn switches() -> impl Iterator<Item = Found> {
    let options = OPTIONS.iter().flat_map(|definition| definition.switches.iter().map(move |switch| (switch, Some(definition))));
    COMMANDS.iter().map(|switch| (switch, None)).chain(options)
}

/// Finds the switch with this letter.
pub(super) fn with_letter(letter: char) -> Option<Found> {
    LETTERS.get(&letter).copied()
}

/// Finds the switch with this word.
pub(super) fn with_word(word: &str) -> Option<Found> {
    WORDS.get(word).copied()
}

/// A set of options: those that were typed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Given(u64);

impl Given {
    /// Adds an option; false if it was there already.
    pub(super) fn insert(&mut self, option: OptionName) -> bool {
        let new = !self.has(option);
        self.0 |= 1 << option as u32;
        new
    }

    /// Whether the option was typed.
    pub(super) const fn has(self, option: OptionName) -> bool {
        self.0 & 1 << option as u32 != 0
    }
}

/// Checks the options against the table.
pub(super) fn check(given: Given, command: CommandName) -> Result<(), Complaint> {
    let column = command as usize;
    let rows = OPTIONS.iter().map(|definition| (definition.name, definition.rules[column], given.has(definition.option)));
    walk(rows, command.name(), "command")
}

/// The kinds of a tunnel, as `--tun-type` names them, and what each thinks of the options `--tun-port --tun-nocsum
/// --tun-csum --tun-remcsum`.
static TUNNELS: [(&str, [Rule; 4]); 3] = [("ipip", rules("----")), ("gue", rules("+111")), ("gre", rules("-11-"))];

/// Whether there is such a type of tunnel.
pub(super) fn is_tunnel_type(name: &str) -> bool {
    TUNNELS.iter().any(|(known, _)| *known == name)
}

/// Checks the options of a tunnel.
pub(super) fn check_tunnel(given: Given, tunnel_type: &str) -> Result<(), Complaint> {
    let Some((name, rules)) = TUNNELS.iter().find(|(name, _)| *name == tunnel_type) else { return Ok(()) };
    let first = OptionName::TunnelPort as usize;
    let rows = OPTIONS[first..].iter().zip(rules).map(|(definition, rule)| (definition.name, *rule, given.has(definition.option)));
    walk(rows, name, "tunnel type")
}

/// Reports the first fault of the rows (name, rule, whether given).
fn walk(rows: impl Iterator<Item = (&'static str, Rule, bool)>, whose: &str, kind: &str) -> Result<(), Complaint> {
    let mut chosen = None;
    for (name, rule, given) in rows {
        match (rule, given) {
            (Rule::Required, false) => {
                return Err(Complaint::Usage(format!("You need to supply the '{name}' option for the '{whose}' {kind}")));
            }
            (Rule::Forbidden, true) => return Err(Complaint::Usage(format!("Illegal '{name}' option with the '{whose}' {kind}"))),
            (Rule::OneOf, true) => {
                if let Some(earlier) = chosen.replace(name) {
                    let conflict = format!("The option '{name}' conflicts with the '{earlier}' option in the '{whose}' {kind}");
                    return Err(Complaint::Usage(conflict));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_the_order_of_their_names() {
        for (index, definition) in OPTIONS.iter().enumerate() {
            assert_eq!(definition.option as usize, index, "{}", definition.name);
        }
        for (index, switch) in COMMANDS.iter().take(COMMAND_COUNT).enumerate() {
            assert!(matches!(switch.meaning, Meaning::Command(name) if name as usize == index), "{}", switch.word);
        }
    }

    #[test]
    fn no_letter_and_no_word_is_taken_twice() {
        let switches = || COMMANDS.iter().chain(OPTIONS.iter().flat_map(|definition| definition.switches));
        let mut letters: Vec<char> = switches().flat_map(|switch| switch.letters.chars()).collect();
        let mut words: Vec<&str> = switches().map(|switch| switch.word).collect();
        let counts = (letters.len(), words.len());
        letters.sort_unstable();
        letters.dedup();
        words.sort_unstable();
        words.dedup();
        assert_eq!((letters.len(), words.len()), counts);
    }
}
