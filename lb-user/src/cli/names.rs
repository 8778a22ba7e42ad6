//! How services, real servers and netmasks are written on the command line.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use anyhow::bail;

use crate::director::model::{Family, Protocol, ServerId, ServiceId};

/// A service: `tcp://10.0.0.200:80`, `udp://[2001:db8::1]:53`, `mark:10`, `mark6:10`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct ServiceName(pub(super) ServiceId);

impl FromStr for ServiceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        for (prefix, family) in [("mark:", Family::Ipv4), ("mark6:", Family::Ipv6)] {
            if let Some(number) = text.strip_prefix(prefix) {
                return Ok(Self(ServiceId::Mark { mark: mark(number)?, family }));
            }
        }
        let (protocol, rest) =
            text.split_once("://").ok_or("write it as tcp://10.0.0.200:80, with udp or sctp for tcp, or as mark:10")?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => return Err(format!("there are no {other} services; use tcp, udp or sctp")),
        };
        let address: SocketAddr =
            rest.parse().map_err(|_| format!("\"{rest}\" is no address with a port; write 10.0.0.200:80 or [2001:db8::1]:80"))?;
        Ok(Self(ServiceId::Address { protocol, address: address.ip(), port: address.port() }))
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.name())
    }
}

/// A firewall mark: a number from 1 on, as iptables and nft write it.
pub(super) fn mark(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.ok().filter(|mark| *mark != 0).ok_or_else(|| format!("\"{text}\" is no mark; use a number from 1 to {}", u32::MAX))
}

/// A real server: an address, with a port or without.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct ServerName {
    address: IpAddr,
    port: Option<u16>,
}

impl ServerName {
    /// The server, as one of this service.
    pub(super) fn of(self, service: &ServiceName) -> ServerId {
        let service_port = match service.0 {
            ServiceId::Address { port, .. } => port,
            ServiceId::Mark { .. } => 0,
        };
        ServerId { address: self.address, port: self.port.unwrap_or(service_port) }
    }
}

impl FromStr for ServerName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self { address: address.ip(), port: Some(address.port()) });
        }
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        let address = bare.parse().map_err(|_| "write an address, or an address with a port: 10.0.0.205:80, [2001:db8::5]:80")?;
        Ok(Self { address, port: None })
    }
}

/// A netmask: `255.255.255.0`, or the length of a prefix.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Netmask {
    /// The mask itself; of IPv4.
    Mask(u32),
    /// The length of a prefix, of either family.
    Prefix(u32),
}

impl Netmask {
    /// What the director takes for a mask that sets no two clients equal.
    pub(super) const fn one_client(family: Family) -> u32 {
        match family {
            Family::Ipv4 => u32::MAX,
            Family::Ipv6 => 128,
        }
    }

    /// The mask as the director takes it: IPv4 as a number, IPv6 as the length of the prefix.
    pub(super) fn of(self, family: Family) -> anyhow::Result<u32> {
        Ok(match (self, family) {
            (Self::Mask(mask), Family::Ipv4) => mask,
            (Self::Prefix(length @ 1..=32), Family::Ipv4) => u32::MAX << (32 - length),
            (Self::Prefix(length @ 1..=128), Family::Ipv6) => length,
            (Self::Prefix(length), Family::Ipv4) => bail!("{length} is no length of an IPv4 prefix; use one from 1 to 32"),
            (Self::Prefix(length), Family::Ipv6) => bail!("{length} is no length of an IPv6 prefix; use one from 1 to 128"),
            (Self::Mask(mask), Family::Ipv6) => {
                bail!(
                    "{} is a netmask of IPv4, and the service is of IPv6; write the length of a prefix, such as 64",
                    Ipv4Addr::from(mask)
                )
            }
        })
    }
}

impl FromStr for Netmask {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(mask) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Mask(mask.into()));
        }
        let length = text.strip_prefix('/').unwrap_or(text).parse();
        length.map(Self::Prefix).map_err(|_| "write 255.255.255.0, or the length of a prefix: 24".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_read_as_they_are_written() {
        for text in ["tcp://10.0.0.200:80", "udp://[2001:db8::1]:53", "sctp://192.0.2.1:9", "mark:10", "mark6:4294967295"] {
            assert_eq!(text.parse::<ServiceName>().expect("it is a service").to_string(), text);
        }
        for text in [
            "10.0.0.200:80",
            "tcp:10.0.0.200:80",
            "http://10.0.0.200:80",
            "tcp://10.0.0.200",
            "tcp://host:80",
            "tcp://1.2.3.4:65536",
            "mark:0",
            "mark:",
            "mark:4294967296",
        ] {
            text.parse::<ServiceName>().expect_err(text);
        }
    }

    #[test]
    fn netmasks_read_in_two_ways() {
        let mask = |text: &str, family| text.parse::<Netmask>().expect("it is a netmask").of(family);
        for (text, family, expected) in [
            ("255.255.255.0", Family::Ipv4, 0xffff_ff00),
            ("255.0.255.0", Family::Ipv4, 0xff00_ff00),
            ("24", Family::Ipv4, 0xffff_ff00),
            ("/32", Family::Ipv4, u32::MAX),
            ("64", Family::Ipv6, 64),
        ] {
            assert_eq!(mask(text, family).expect("it is of this family"), expected);
        }
        for (text, family) in [("33", Family::Ipv4), ("0", Family::Ipv6), ("129", Family::Ipv6), ("255.255.255.0", Family::Ipv6)] {
            mask(text, family).expect_err(text);
        }
        "wide".parse::<Netmask>().expect_err("it is a word");
    }

    #[test]
    fn a_server_has_the_port_of_its_service() {
        let service = "tcp://10.0.0.200:80".parse().expect("it is a service");
        for (text, expected) in [
            ("10.0.0.205", "10.0.0.205:80"),
            ("10.0.0.205:8080", "10.0.0.205:8080"),
            ("2001:db8::5", "[2001:db8::5]:80"),
            ("[2001:db8::5]", "[2001:db8::5]:80"),
            ("[2001:db8::5]:81", "[2001:db8::5]:81"),
        ] {
            let server: ServerName = text.parse().expect("it is a server");
            assert_eq!(server.of(&service).to_string(), expected);
        }
        "host:80".parse::<ServerName>().expect_err("names are not looked up");
    }
}
