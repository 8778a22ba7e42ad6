//! Connections that begin and end, one frame each, and who got them: for tests of schedulers.
//!
//! The frames run through the loaded programs of a [`Bench`]; the director's own table says which real server each
//! connection has. A daemon beside it follows the counters, as it would with packets from a wire.
//!
//! ```no_run
//! use bpfvs_tests::{arrivals::Arrivals, bench::Bench};
//!
//! let bench = Bench::new(&[])?;
//! bench.bpfvs.ipvsadm("-A -t 10.99.0.1:80 -s wlc")?;
//! bench.bpfvs.ipvsadm("-a -t 10.99.0.1:80 -r 10.1.0.1:80 -g")?;
//! bench.director.enter(|| {
//!     let mut arrivals = Arrivals::new(&bench)?;
//!     let connection = arrivals.open()?;
//!     assert_eq!(connection.server, Some(bench.server_index("10.1.0.1")?));
//!     arrivals.finish(&connection)
//! })?;
//! # anyhow::Ok(())
//! ```
//!
//! Everything here has to be called in the director's namespace.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Range,
};

use anyhow::{Context, Result, ensure};

use crate::{
    bench::{Addresses, Bench},
    frame::{ACK, FIN, Frame, SYN},
    lab::Family,
    test_run::{Hook, Verdict},
};

/// A client's connection.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The index of its real server; nothing if nobody took it.
    pub server: Option<u32>,
}

/// Connections to port 80 of a bench's IPv4 address, each of a client of its own.
#[derive(Debug)]
pub struct Arrivals<'a> {
    bench: &'a Bench,
    vip: SocketAddr,
    next: u32,
    buffer: Vec<u8>,
}

impl<'a> Arrivals<'a> {
    /// None yet.
    pub fn new(bench: &'a Bench) -> Result<Self> {
        let vip = SocketAddr::new(Addresses::of(Family::Ipv4).vip.parse()?, 80);
        Ok(Self { bench, vip, next: 0, buffer: vec![0; 4096] })
    }

    /// A connection begins.
    pub fn open(&mut self) -> Result<Connection> {
        let client = self.begin()?;
        let server = self.bench.pinned.connection_v4(client, self.vip)?.map(|connection| connection.server);
        Ok(Connection { client, server })
    }

    /// A connection begins, and nobody looks who got it.
    pub fn begin(&mut self) -> Result<SocketAddr> {
        let client =
            SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x0a09_0100 + self.next / 50_000)), (1024 + self.next % 50_000) as u16);
        self.next += 1;
        self.send(client, SYN)?;
        Ok(client)
    }

    /// The client sends something on a connection; whether the real server gets it.
    pub fn talk(&mut self, connection: &Connection) -> Result<bool> {
        Ok(self.send(connection.client, ACK)? == Verdict::Send)
    }

    /// The client says that it has no more to say: the connection is not active any more.
    pub fn finish(&mut self, connection: &Connection) -> Result<()> {
        let verdict = self.send(connection.client, FIN | ACK)?;
        ensure!(verdict == Verdict::Send, "the end of a connection was not forwarded: {verdict:?}");
        Ok(())
    }

    fn send(&mut self, client: SocketAddr, flags: u8) -> Result<Verdict> {
        let frame = Frame::tcp(client, self.vip, flags).build();
        let (verdict, _) = self.bench.pinned.run_into(Hook::Tc, &frame, &mut self.buffer)?;
        Ok(verdict)
    }
}

/// Makes real servers reachable, as far as bpfvs can see: the hosts 10.1.1.0 and up, by number. Returns their addresses.
pub fn servers(bench: &Bench, numbers: Range<u16>) -> Result<Vec<Ipv4Addr>> {
    let address = |number| Ipv4Addr::from(0x0a01_0100 + u32::from(number));
    let addresses: Vec<_> = numbers.map(address).collect();
    let line = |address: &Ipv4Addr| format!("neigh add {address} lladdr 02:00:00:00:02:01 dev eth0 nud permanent");
    let lines: Vec<_> = addresses.iter().map(line).collect();
    bench.director.ip(&lines.join("\n")).context("make real servers reachable")?;
    Ok(addresses)
}
