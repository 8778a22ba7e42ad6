//! UDP has no states. It is only told apart whether anything followed the first packet.

/// The state of a UDP connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum State {
    /// As IPVS has it: the only one.
    #[doc(alias = "IP_VS_UDP_S_NORMAL")]
    Normal = 0,
    /// No more was seen than one packet of the client.
    First = 1,
    /// Not even that.
    None = 2,
}

/// The state after another packet.
#[inline(always)]
pub const fn next(state: u8) -> u8 {
    (state & 2) >> 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_packet_makes_it_normal() {
        assert_eq!(next(State::None as u8), State::First as u8);
        assert_eq!(next(State::First as u8), State::Normal as u8);
        assert_eq!(next(State::Normal as u8), State::Normal as u8);
    }
}
