//! The eBPF programs: loaded into the kernel, with their maps, and pinned.
//!
//! Loading creates the maps that are not pinned yet and reopens the others. The programs themselves are pinned, too, for
//! whoever wants to look at them or measure them; the daemon always loads its own, so that an upgrade is one.
//!
//! When the verifier refuses a program, its log is thousands of lines; the last ten say why, and only they are shown.

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfLoader,
    maps::ProgramArray,
    programs::{Program, ProgramError, RawTracePoint, SchedClassifier, Xdp},
};

use super::{
    filter::Kernel,
    maps::{CONNECTION_TABLES, OBJECT, Pins, remove_pin},
};

const XDP: &str = "xdp_director";
const TC: &str = "tc_director";
const XDP_ODD: &str = "xdp_odd";
const TC_ODD: &str = "tc_odd";
const XDP_TRANSLATE: &str = "xdp_translate";
const TC_TRANSLATE: &str = "tc_translate";
const XDP_CROSS: &str = "xdp_cross";
const TC_CROSS: &str = "tc_cross";
const SWEEP: &str = "sweep";
/// The arrays through which programs call others, and the places in them.
const XDP_NEXT: &str = "XDP_NEXT";
const TC_NEXT: &str = "TC_NEXT";
const NEXT_ODD: u32 = 0;
const NEXT_TRANSLATE: u32 = 1;
const NEXT_CROSS: u32 = 2;
/// The maps with the programs' global variables, the filters.
const DESTINATIONS: &str = ".bss";
const SOURCES: &str = ".bss.sources";

/// The loaded programs.
#[derive(Debug)]
pub struct Programs {
    ebpf: Ebpf,
    /// The programs for translation are loaded.
    translates: bool,
    /// Those for translation between IPv6 and IPv4 are.
    crosses: bool,
}

impl Programs {
    /// Loads all programs and pins them and their maps.
    pub fn load(pins: &Pins, hz: u32, max_connections: u32) -> anyhow::Result<Self> {
        let object = aya_obj::Object::parse(OBJECT).context("the compiled eBPF object is damaged; build bpfvs anew")?;
        let mut loader = EbpfLoader::new();
        loader.override_global("HZ", &hz, true);
        for name in object.maps.keys().filter(|name| !name.starts_with('.')) {
            loader.map_pin_path(name, pins.map(name));
        }
        for table in CONNECTION_TABLES {
            loader.map_max_entries(table, max_connections);
        }
        let mut ebpf = loader.load(OBJECT).map_err(|error| {
            anyhow!(error).context(format!(
                "the maps of {} cannot be created for {max_connections} connections; is bpfvs run as root, the kernel at least 5.15, and is there \
                 enough memory? (`--max-connections` takes about 100 bytes for each connection)",
                pins.directory().display()
            ))
        })?;
        load_program::<Xdp>(&mut ebpf, XDP, Xdp::load)?;
        load_program::<SchedClassifier>(&mut ebpf, TC, SchedClassifier::load)?;
        load_program::<RawTracePoint>(&mut ebpf, SWEEP, RawTracePoint::load)?;
        load_program::<Xdp>(&mut ebpf, XDP_ODD, Xdp::load)?;
        load_program::<SchedClassifier>(&mut ebpf, TC_ODD, SchedClassifier::load)?;
        make_callable(&mut ebpf, XDP_NEXT, NEXT_ODD, XDP_ODD)?;
        make_callable(&mut ebpf, TC_NEXT, NEXT_ODD, TC_ODD)?;
        for name in [XDP, TC, XDP_ODD, TC_ODD, SWEEP] {
            pin(&mut ebpf, pins, name)?;
        }
        Ok(Self { ebpf, translates: false, crosses: false })
    }

    /// Loads the programs for translation, unless that is done. The verifier has more to do with them than with all others,
    /// and most directors never masquerade.
    pub fn load_translation(&mut self, pins: &Pins) -> anyhow::Result<()> {
        if self.translates {
            return Ok(());
        }
        self.load_pair(pins, NEXT_TRANSLATE, XDP_TRANSLATE, TC_TRANSLATE)?;
        self.translates = true;
        Ok(())
    }

    /// Loads the programs for translation between IPv6 and IPv4, unless that is done, and those for all translation.
    pub fn load_crossing(&mut self, pins: &Pins) -> anyhow::Result<()> {
        self.load_translation(pins)?;
        if self.crosses {
            return Ok(());
        }
        self.load_pair(pins, NEXT_CROSS, XDP_CROSS, TC_CROSS)?;
        self.crosses = true;
        Ok(())
    }

    /// Loads a program for each hook, and puts them where the others call them.
    fn load_pair(&mut self, pins: &Pins, place: u32, xdp: &str, tc: &str) -> anyhow::Result<()> {
        load_program::<Xdp>(&mut self.ebpf, xdp, Xdp::load)?;
        load_program::<SchedClassifier>(&mut self.ebpf, tc, SchedClassifier::load)?;
        for (array, name) in [(XDP_NEXT, xdp), (TC_NEXT, tc)] {
            make_callable(&mut self.ebpf, array, place, name)?;
            pin(&mut self.ebpf, pins, name)?;
        }
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

    /// The XDP program.
    pub fn xdp(&mut self) -> anyhow::Result<&mut Xdp> {
        Ok(self.ebpf.program_mut(XDP).with_context(|| missing(XDP))?.try_into()?)
    }

    /// The tc program.
    pub fn tc(&mut self) -> anyhow::Result<&mut SchedClassifier> {
        Ok(self.ebpf.program_mut(TC).with_context(|| missing(TC))?.try_into()?)
    }

    /// The pinned sweep program, by itself.
    pub fn sweep(pins: &Pins) -> anyhow::Result<RawTracePoint> {
        let path = pins.program(SWEEP);
        RawTracePoint::from_pin(&path).with_context(|| format!("the program {} cannot be opened", path.display()))
    }

    /// How many instructions the verifier walked through for each program. Kernel 5.16.
    pub fn verified_instructions(&self) -> Vec<(String, u32)> {
        self.ebpf
            .programs()
            .filter_map(|(name, program)| Some((name.to_owned(), program.info().ok()?.verified_instruction_count()?)))
            .collect()
    }
}

/// Puts a program where the others call it.
fn make_callable(ebpf: &mut Ebpf, array: &str, place: u32, name: &str) -> anyhow::Result<()> {
    let program = ebpf.program(name).with_context(|| missing(name))?.fd()?.try_clone()?;
    let mut programs = ProgramArray::try_from(ebpf.map_mut(array).with_context(|| missing(array))?)?;
    programs.set(place, &program, 0).with_context(|| format!("the program {name} cannot be put where the others call it"))
}

fn pin(ebpf: &mut Ebpf, pins: &Pins, name: &str) -> anyhow::Result<()> {
    let path = pins.program(name);
    remove_pin(&path).with_context(|| format!("the old pin {} cannot be removed", path.display()))?;
    let program = ebpf.program_mut(name).with_context(|| missing(name))?;
    program.pin(&path).with_context(|| format!("the program {name} cannot be pinned at {}", path.display()))
}

fn load_program<'a, P: 'a>(ebpf: &'a mut Ebpf, name: &str, load: fn(&mut P) -> Result<(), ProgramError>) -> anyhow::Result<()>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
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
