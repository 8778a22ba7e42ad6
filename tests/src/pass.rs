//! An XDP program that lets everything pass, for the far end of a veth pair.
//!
//! A veth device takes frames from XDP (`XDP_TX`, `XDP_REDIRECT`) only if its peer has an XDP program, too; without one they
//! wait in a ring for ever, and are counted as sent. Hardware knows no such thing. The program has two instructions, so it
//! is written here as an object file in memory instead of by a compiler.

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    programs::{Xdp, xdp::XdpMode},
};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
    write::{Object, Symbol, SymbolSection},
};

use crate::netns::Namespace;

/// `r0 = XDP_PASS; exit`
const INSTRUCTIONS: [u8; 16] = [0xb7, 0, 0, 0, 2, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];

/// The program, attached to interfaces until this is dropped.
#[derive(Debug)]
pub struct PassProgram {
    /// The links go with it.
    _program: Ebpf,
}

impl PassProgram {
    /// Attaches the program, in driver mode, to interfaces of a namespace.
    pub fn attach(namespace: &Namespace, interfaces: &[&str]) -> Result<Self> {
        let object = object_file()?;
        let mut ebpf = Ebpf::load(&object).context("load the program that passes everything")?;
        let program: &mut Xdp = ebpf.program_mut("pass").context("the object holds one program")?.try_into()?;
        program.load()?;
        namespace.enter(|| {
            for interface in interfaces {
                program
                    .attach(interface, XdpMode::Driver)
                    .with_context(|| format!("attach the program that passes everything to {interface}"))?;
            }
            anyhow::Ok(())
        })?;
        Ok(Self { _program: ebpf })
    }
}

/// The program as an object file, with the section `xdp`.
pub fn object_file() -> Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let license = object.add_section(Vec::new(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    let code = object.add_section(Vec::new(), b"xdp".to_vec(), SectionKind::Text);
    object.append_section_data(code, &INSTRUCTIONS, 8);
    object.add_symbol(Symbol {
        name: b"pass".to_vec(),
        value: 0,
        size: INSTRUCTIONS.len() as u64,
        kind: SymbolKind::Text,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Section(code),
        flags: SymbolFlags::None,
    });
    object.write().context("write the object file in memory")
}
