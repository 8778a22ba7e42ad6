//! The eBPF programs: loaded into the kernel, with their maps, and pinned.
//!
//! Loading creates the maps that are not pinned yet and reopens the others. The programs themselves are pinned, too, for
//! whoever wants to look at them or measure them; the daemon always loads its own, so that an upgrade is one.
//!
//! A hook's programs are loaded when the first interface wants that hook, and those that translate addresses with the first
//! real server that is masqueraded: what nobody needs costs neither start time nor memory.
//!
//! When the verifier refuses a program, its log is thousands of lines; the last ten say why, and only they are shown.

use anyhow::{Context as _, anyhow};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{MapData, ProgramArray},
    programs::{Iter, Program, ProgramError, RawTracePoint, SchedClassifier, Xdp},
};

use super::{
    capacity::Tables,
    filter::Kernel,
    maps::{BPF_F_NO_PREALLOC, CONNECTION_TABLES, OBJECT, PREALLOCATED_TABLES, Pins, remove_pin},
};
use crate::director::model::TableMemory;

/// The programs of a hook.
struct Hooked {
    /// What is attached to interfaces.
    director: &'static str,
    /// What it calls, and what these call, by their places: for rare packets, for those whose addresses are translated, for those that
    /// change their IP version, and for those whose Call-ID is to be read.
    called: [&'static str; 4],
    /// The array through which they call each other.
    next: &'static str,
}

const XDP: Hooked =
    Hooked { director: "xdp_director", called: ["xdp_odd", "xdp_translate", "xdp_cross", "xdp_sip"], next: "XDP_NEXT" };
const TC: Hooked = Hooked { director: "tc_director", called: ["tc_odd", "tc_translate", "tc_cross", "tc_sip"], next: "TC_NEXT" };
const SWEEP: &str = "sweep";
/// The programs that the sweep has see a table's entries, and these tables, in the order of [`lb_common::config::SweptTable`].
pub const SWEPT_TABLES: [(&str, &str); 8] = [
    ("sweep_ipv4", "CONNECTIONS_V4"),
    ("sweep_ipv6", "CONNECTIONS_V6"),
    ("sweep_callers_ipv4", "CALLERS_V4"),
    ("sweep_callers_ipv6", "CALLERS_V6"),
    ("sweep_templates_ipv4", "TEMPLATES_V4"),
    ("sweep_templates_ipv6", "TEMPLATES_V6"),
    ("sweep_calls_ipv4", "CALLS_V4"),
    ("sweep_calls_ipv6", "CALLS_V6"),
];
/// The places in the arrays through which programs call each other.
const NEXT_ODD: usize = 0;
const NEXT_TRANSLATE: usize = 1;
const NEXT_CROSS: usize = 2;
const NEXT_SIP: usize = 3;
/// The maps with the programs' global variables, the filters.
const DESTINATIONS: &str = ".bss";
const SOURCES: &str = ".bss.sources";

/// The loaded programs.
#[derive(Debug)]
pub struct Programs {
    ebpf: Ebpf,
    pins: Pins,
    /// The programs for XDP are loaded.
    xdp: bool,
    /// The same for tc.
    tc: bool,
    /// The places of those that are loaded with the programs of their hook.
    wanted: Vec<usize>,
}

impl Programs {
    /// Makes or reopens the maps, and loads and pins the sweep. The others are loaded when they are wanted: the verifier
    /// takes its time for each. `picks_at_once` is how many picks a CPU takes from a service's cursor.
    pub fn load(pins: &Pins, hz: u32, tables: Tables, picks_at_once: u32) -> anyhow::Result<Self> {
        let object = aya_obj::Object::parse(OBJECT).context("the compiled eBPF object is damaged; build bpfvs anew")?;
        let btf = Btf::from_sys_fs().context(
            "the kernel does not describe its types (/sys/kernel/btf/vmlinux), without which connections cannot expire; bpfvs needs a kernel \
             with CONFIG_DEBUG_INFO_BTF, as the distributions' are",
        )?;
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf));
        loader.override_global("HZ", &hz, true).override_global("PICKS_AT_ONCE", &picks_at_once, true);
        for name in object.maps.keys().filter(|name| !name.starts_with('.')) {
            loader.map_pin_path(name, pins.map(name));
        }
        for table in CONNECTION_TABLES {
            loader.map_max_entries(table, tables.max_connections);
        }
        let (mib, max_connections) = (tables.size() >> 20, tables.max_connections);
        let no_room = || {
            format!(
                "the maps of {} cannot be created for {max_connections} connections; is bpfvs run as root, the kernel at least 5.15, and is there \
                 enough memory? (`--max-connections` takes {mib} MiB)",
                pins.directory().display(),
            )
        };
        if tables.memory == TableMemory::OnDemand {
            make_on_demand(pins, &object, max_connections).with_context(no_room)?;
        }
        let mut ebpf = loader.load(OBJECT).with_context(no_room)?;
        for name in [XDP, TC].into_iter().flat_map(|hooked| [&[hooked.director][..], &hooked.called].concat()) {
            // An earlier daemon's, which this one may not need.
            unpin(pins, name)?;
        }
        load_program::<RawTracePoint>(&mut ebpf, SWEEP, RawTracePoint::load)?;
        pin(&mut ebpf, pins, SWEEP)?;
        for (name, _) in SWEPT_TABLES {
            load_program::<Iter>(&mut ebpf, name, |program| program.load("bpf_map_elem", &btf))?;
            pin(&mut ebpf, pins, name)?;
        }
        Ok(Self { ebpf, pins: pins.clone(), xdp: false, tc: false, wanted: vec![NEXT_ODD] })
    }

    /// Sees to it that packets can be translated. The verifier has more to do with these programs than with all others, and
    /// most directors never masquerade.
    pub fn load_translation(&mut self) -> anyhow::Result<()> {
        self.want(NEXT_TRANSLATE)
    }

    /// Sees to it that packets can be translated between IPv6 and IPv4.
    pub fn load_crossing(&mut self) -> anyhow::Result<()> {
        self.want(NEXT_TRANSLATE)?;
        self.want(NEXT_CROSS)
    }

    /// Sees to it that the Call-ID of SIP messages can be read.
    pub fn load_sip(&mut self) -> anyhow::Result<()> {
        self.want(NEXT_SIP)
    }

    /// Sees to it that there are programs at a place.
    fn want(&mut self, place: usize) -> anyhow::Result<()> {
        if self.wanted.contains(&place) {
            return Ok(());
        }
        if self.xdp {
            self.load_called::<Xdp>(&XDP, place, Xdp::load)?;
        }
        if self.tc {
            self.load_called::<SchedClassifier>(&TC, place, SchedClassifier::load)?;
        }
        self.wanted.push(place);
        Ok(())
    }

    /// The loaded programs' filter of virtual addresses, which is empty until it is written. It can be taken once.
    pub fn take_destinations(&mut self) -> anyhow::Result<Kernel> {
        self.take_filter(DESTINATIONS)
    }

    /// The same of masqueraded real servers.
    pub fn take_sources(&mut self) -> anyhow::Result<Kernel> {
        self.take_filter(SOURCES)
    }

    fn take_filter(&mut self, name: &str) -> anyhow::Result<Kernel> {
        let map = self.ebpf.take_map(name).with_context(|| missing(name))?;
        map.try_into().with_context(|| format!("the programs' filter {name} is not what it should be; build bpfvs anew"))
    }

    /// The XDP program, ready to be attached.
    pub fn xdp(&mut self) -> anyhow::Result<&mut Xdp> {
        if !self.xdp {
            self.load_hook::<Xdp>(&XDP, Xdp::load)?;
            self.xdp = true;
        }
        Ok(self.ebpf.program_mut(XDP.director).with_context(|| missing(XDP.director))?.try_into()?)
    }

    /// The tc program, ready to be attached.
    pub fn tc(&mut self) -> anyhow::Result<&mut SchedClassifier> {
        if !self.tc {
            self.load_hook::<SchedClassifier>(&TC, SchedClassifier::load)?;
            self.tc = true;
        }
        Ok(self.ebpf.program_mut(TC.director).with_context(|| missing(TC.director))?.try_into()?)
    }

    /// Loads the programs of a hook, before any interface has them.
    ///
    /// The director comes first, and with it into the better place: behind programs that are many times as large a packet took
    /// 47 to 50 ns instead of 40 to 42 (AMD EPYC, Linux 6.18).
    fn load_hook<P>(&mut self, hooked: &Hooked, load: fn(&mut P) -> Result<(), ProgramError>) -> anyhow::Result<()>
    where
        for<'a> &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
    {
        load_program(&mut self.ebpf, hooked.director, load)?;
        for place in self.wanted.clone() {
            self.load_called(hooked, place, load)?;
        }
        pin(&mut self.ebpf, &self.pins, hooked.director)
    }

    /// Loads a program that others call, and puts it where they do.
    fn load_called<P>(&mut self, hooked: &Hooked, place: usize, load: fn(&mut P) -> Result<(), ProgramError>) -> anyhow::Result<()>
    where
        for<'a> &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
    {
        let name = hooked.called[place];
        load_program(&mut self.ebpf, name, load)?;
        make_callable(&mut self.ebpf, hooked.next, place as u32, name)?;
        pin(&mut self.ebpf, &self.pins, name)
    }

    /// The pinned program that begins a sweep, by itself.
    pub fn sweep(pins: &Pins) -> anyhow::Result<RawTracePoint> {
        let path = pins.program(SWEEP);
        RawTracePoint::from_pin(&path).with_context(|| format!("the program {} cannot be opened", path.display()))
    }

    /// One of those that see the entries.
    pub fn iterator(pins: &Pins, name: &str) -> anyhow::Result<Iter> {
        let path = pins.program(name);
        Iter::from_pin(&path).with_context(|| format!("the program {} cannot be opened", path.display()))
    }

    /// How many instructions the verifier walked through for each program. Kernel 5.16.
    pub fn verified_instructions(&self) -> Vec<(String, u32)> {
        self.ebpf
            .programs()
            .filter_map(|(name, program)| Some((name.to_owned(), program.info().ok()?.verified_instruction_count()?)))
            .collect()
    }
}

/// Makes the tables of connections, unless they are there, so that they take memory as they fill: the loader opens what it finds pinned,
/// and makes nothing in another way than the object says.
fn make_on_demand(pins: &Pins, object: &aya_obj::Object, max_connections: u32) -> anyhow::Result<()> {
    for name in PREALLOCATED_TABLES {
        let path = pins.map(name);
        if path.exists() {
            continue;
        }
        let mut map = object.maps.get(name).with_context(|| missing(name))?.clone();
        map.set_max_entries(max_connections);
        if let aya_obj::Map::Legacy(legacy) = &mut map {
            legacy.def.map_flags |= BPF_F_NO_PREALLOC;
        }
        MapData::create(map, name, None)?.pin(&path).with_context(|| format!("the map cannot be pinned at {}", path.display()))?;
    }
    Ok(())
}

/// Puts a program where the others call it.
fn make_callable(ebpf: &mut Ebpf, array: &str, place: u32, name: &str) -> anyhow::Result<()> {
    let program = ebpf.program(name).with_context(|| missing(name))?.fd()?.try_clone()?;
    let mut programs = ProgramArray::try_from(ebpf.map_mut(array).with_context(|| missing(array))?)?;
    programs.set(place, &program, 0).with_context(|| format!("the program {name} cannot be put where the others call it"))
}

fn pin(ebpf: &mut Ebpf, pins: &Pins, name: &str) -> anyhow::Result<()> {
    unpin(pins, name)?;
    let path = pins.program(name);
    let program = ebpf.program_mut(name).with_context(|| missing(name))?;
    program.pin(&path).with_context(|| format!("the program {name} cannot be pinned at {}", path.display()))
}

fn unpin(pins: &Pins, name: &str) -> anyhow::Result<()> {
    let path = pins.program(name);
    remove_pin(&path).with_context(|| format!("the old pin {} cannot be removed", path.display()))
}

fn load_program<P>(ebpf: &mut Ebpf, name: &str, load: impl FnOnce(&mut P) -> Result<(), ProgramError>) -> anyhow::Result<()>
where
    for<'a> &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program: &mut P = ebpf.program_mut(name).with_context(|| missing(name))?.try_into()?;
    load(program).map_err(|error| explain(name, error))
}

fn explain(name: &str, error: ProgramError) -> anyhow::Error {
    if let ProgramError::LoadError { io_error, verifier_log } = &error {
        let log = verifier_log.to_string();
        return anyhow!(
            "the kernel refuses the program {name}: {io_error}; please report it with the kernel's version and the end of the verifier's \
             log:\n{}",
            last_lines(&log, 10)
        );
    }
    anyhow!(error).context(format!("the program {name} cannot be loaded"))
}

fn missing(name: &str) -> String {
    format!("the compiled eBPF object has no {name}; build bpfvs anew")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn only_the_end_of_a_log_is_shown() {
        assert_eq!(last_lines("a\nb\n\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 10), "a");
    }
}
