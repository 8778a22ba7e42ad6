//! What is wanted: nanoseconds per packet, less the harness, that each path must keep to, and those that we would like to see.
//!
//! They hold at XDP; at tc 1.35 times as much. They are nanoseconds of one machine (two virtual CPUs of AMD's Zen 5, with
//! retpolines and Safe RET), so nothing fails because of them: whoever measures elsewhere compares the column with their floor.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

use super::{Case, Path, measure::Figures};
use crate::{lab::Family, test_run::Hook};

/// How much dearer tc may be than XDP.
const TC: f64 = 1.35;

/// How much more a packet of IPv6 may take: its key is 40 bytes instead of 16. For UDP and NAT only IPv4 was given a figure of its own,
/// so IPv6 is allowed there what it is allowed with direct routing and tunnels.
const IPV6: f64 = 15.0;

/// What is wanted of a case.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Target {
    /// What it must keep to.
    pub must: f64,
    /// What would be fine.
    pub stretch: Option<f64>,
}

impl Target {
    /// That of a case, if there is one.
    pub fn of(case: Case) -> Option<Self> {
        // What each packet costs that is a run of its own, has the cold caches of a system call in it.
        if !case.repeats() {
            return None;
        }
        let is_v4 = case.family == Family::Ipv4;
        let is_warm = case.flows <= 1 << 10;
        let of_family = |four: (f64, f64), six: (f64, f64)| Some(if is_v4 { four } else { six });
        let (must, stretch) = match case.path {
            Path::NotOurs => Some((30.0, 8.0)),
            Path::Routed if is_warm => of_family((45.0, 20.0), (45.0 + IPV6, 25.0)),
            Path::Routed if is_v4 => return Self::of_random_flows(case.flows).map(|target| target.at(case.hook)),
            Path::Datagram if is_warm => of_family((50.0, 22.0), (50.0 + IPV6, 27.0)),
            Path::Tunnelled if is_warm => of_family((60.0, 35.0), (60.0 + IPV6, 40.0)),
            Path::Masqueraded | Path::Replied if is_warm => of_family((50.0, 25.0), (50.0 + IPV6, 30.0)),
            Path::New if case.flows == 1 << 20 => Some((600.0, 220.0)),
            _ => None,
        }?;
        Some(Self { must, stretch: Some(stretch) }.at(case.hook))
    }

    /// Those of direct routing, IPv4, when packets come in no order.
    const fn of_random_flows(flows: u64) -> Option<Self> {
        match flows {
            0x1_0001..=0x2_0000 => Some(Self { must: 200.0, stretch: Some(150.0) }),
            0x8_0001..=0x10_0000 => Some(Self { must: 250.0, stretch: Some(200.0) }),
            0x20_0001..=0x40_0000 => Some(Self { must: 330.0, stretch: None }),
            _ => None,
        }
    }

    fn at(self, hook: Hook) -> Self {
        let factor = if hook == Hook::Xdp { 1.0 } else { TC };
        Self { must: self.must * factor, stretch: self.stretch.map(|stretch| stretch * factor) }
    }

    /// How figures stand to it.
    pub fn standing(&self, figures: &Figures) -> Standing {
        let took = figures.director.minimum;
        match () {
            () if took > self.must => Standing::Missed,
            () if self.stretch.is_some_and(|stretch| took > stretch) => Standing::Met,
            () => Standing::Stretched,
        }
    }
}

impl Display for Target {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self.stretch {
            Some(stretch) => formatter.pad(&format!("{:.0}/{stretch:.0}", self.must)),
            None => formatter.pad(&format!("{:.0}/-", self.must)),
        }
    }
}

/// How a case stands to its target.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It takes longer than it must.
    Missed,
    /// It does what it must.
    Met,
    /// It does what would be fine.
    Stretched,
}

impl Display for Standing {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Missed => "MISSED",
            Self::Met => "must",
            Self::Stretched => "stretch",
        })
    }
}

/// What stands between a case and its stretch, in half a sentence.
pub fn obstacle(case: Case, figures: &Figures, target: &Target) -> String {
    let stretch = target.stretch.unwrap_or(target.must);
    match (case.path, figures.floor) {
        (Path::Tunnelled, _) => {
            "bpf_xdp_adjust_head takes some 10 ns of it, the look-up of the connection most of the rest".to_owned()
        }
        (_, Some(floor)) if floor.minimum > stretch => {
            let does = if case.path.is_new() { "parses, inserts and" } else { "parses, looks the connection up and" };
            format!("the floor, which only {does} sends, takes {:.1} already", floor.minimum)
        }
        (_, Some(floor)) => format!("the floor takes {:.1}; the rest is what a director does besides", floor.minimum),
        (_, None) => "the filter, which is all that it asks, is read after the headers".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tc_may_take_a_third_more() {
        let case = |hook| Case { hook, family: Family::Ipv4, path: Path::Routed, flows: 1 };
        let [xdp, tc] = Hook::ALL.map(|hook| Target::of(case(hook)).expect("there is a target for direct routing"));
        assert_eq!((xdp.must, xdp.stretch), (45.0, Some(20.0)));
        assert!((tc.must - 60.75).abs() < 1e-9, "{tc:?}");
    }

    #[test]
    fn numbers_of_flows_have_targets_of_their_own() {
        let must =
            |flows| Target::of(Case { hook: Hook::Xdp, family: Family::Ipv4, path: Path::Routed, flows }).map(|target| target.must);
        assert_eq!([1 << 17, 1 << 20, 1 << 22].map(must), [Some(200.0), Some(250.0), Some(330.0)]);
        assert_eq!([1 << 16, 1 << 23].map(must), [None, None]);
    }
}
