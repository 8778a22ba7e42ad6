//! A TCP client, segment by segment: for what no ordinary client would say.
//!
//! It has an address that its host does not know, so that the host keeps out of its conversation. The server must have its
//! hardware address as a permanent neighbour, because it answers no questions.
//!
//! ```no_run
//! use bpfvs_tests::{caller::Caller, netns::Namespace};
//!
//! let (outside, server) = (Namespace::new("outside")?, Namespace::new("server")?);
//! outside.connect("eth0", &server, "eth0")?;
//! let mut caller = Caller::dial(&outside, &server, "10.9.0.9:1000".parse()?, "10.9.0.1:80".parse()?)?;
//! caller.say(&[], b"")?;
//! caller.say(&[1, 1, 1, 1], b"GET / HTTP/1.0\r\n\r\n")?;
//! # anyhow::Ok(())
//! ```

use std::{
    net::SocketAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, send},
};

use crate::{
    differential::wire::raw_socket,
    frame::{ACK, FIN, Frame, SYN, Transport},
    netns::Namespace,
    wait,
};

/// A connection of a client that is written out by hand.
#[derive(Debug)]
pub struct Caller {
    socket: OwnedFd,
    /// Hardware addresses of the server and of the client.
    macs: [[u8; 6]; 2],
    source: SocketAddr,
    destination: SocketAddr,
    /// The number of the next byte to send.
    next: u32,
    /// The number of the next byte to receive.
    expected: u32,
}

impl Caller {
    /// Sends SYN from `eth0` of one namespace to `eth0` of the other, and waits for the answer.
    pub fn dial(outside: &Namespace, server: &Namespace, source: SocketAddr, destination: SocketAddr) -> Result<Self> {
        let socket = outside.enter(|| raw_socket("eth0"))?;
        let macs = [server.mac("eth0")?, outside.mac("eth0")?];
        let mut caller = Self { socket, macs, source, destination, next: 1000, expected: 0 };
        caller.send(SYN, &[], b"")?;
        caller.next += 1;
        let begin = Instant::now();
        loop {
            let mut frame = [0; 2048];
            match recv(caller.socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(length) => {
                    if let Some(number) = caller.answer(&frame[..length]) {
                        caller.expected = number.wrapping_add(1);
                        return Ok(caller);
                    }
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error).context("receive a frame"),
            }
            ensure!(begin.elapsed() < wait::SOON, "{destination} does not answer a SYN from {source}");
        }
    }

    /// Sends one segment with these options and data.
    pub fn say(&mut self, options: &[u8], data: &[u8]) -> Result<()> {
        self.send(ACK, options, data)?;
        self.next += data.len() as u32;
        Ok(())
    }

    /// Ends the connection; nobody waits for the other side.
    pub fn close(self) -> Result<()> {
        self.send(FIN | ACK, &[], b"")
    }

    fn send(&self, flags: u8, options: &[u8], data: &[u8]) -> Result<()> {
        let segment = Transport::Segment { flags, sequence: self.next, acknowledgement: self.expected, options: options.to_vec() };
        let mut frame = Frame { payload: data.to_vec(), ..Frame::new(self.source, self.destination, segment) }.build();
        frame[..12].copy_from_slice(&self.macs.concat());
        send(self.socket.as_raw_fd(), &frame, MsgFlags::empty()).context("send a segment")?;
        Ok(())
    }

    /// The number in a SYN and ACK for this client.
    fn answer(&self, frame: &[u8]) -> Option<u32> {
        let packet = frame.strip_prefix(&self.macs[1])?.get(8..)?;
        let (protocol, segment) = match packet.first()? >> 4 {
            4 => (packet.get(9)?, packet.get(20..)?),
            _ => (packet.get(6)?, packet.get(40..)?),
        };
        let ports = [self.destination.port().to_be_bytes(), self.source.port().to_be_bytes()].concat();
        let ours = *protocol == 6 && segment.starts_with(&ports) && *segment.get(13)? == SYN | ACK;
        if ours { Some(u32::from_be_bytes(*segment.get(4..)?.first_chunk()?)) } else { None }
    }
}
